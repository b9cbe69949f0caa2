"""The convolution and depthwise kernels on a GPU at the sizes of ResNet-18, ResNet-50 and MobileNetV2."""

import pytest
from device_operators import check_conv, check_depthwise

pytestmark = pytest.mark.usefixtures("poisoned")
CONVS = [
    # form, c_in, c_out, kernel, stride, size, granularity
    ("dense-compact", 64, 64, 3, 1, 56, 8), ("compact-dense", 64, 64, 3, 1, 56, 8),
    ("dense-compact", 128, 256, 3, 2, 28, 32), ("compact-dense", 256, 256, 3, 1, 14, 32),
    ("dense-compact", 512, 512, 3, 1, 7, 64), ("compact-dense", 512, 512, 3, 1, 7, 64),
    ("dense-compact", 256, 64, 1, 1, 56, 8), ("compact-compact", 64, 64, 3, 1, 56, 8),
    ("compact-dense", 64, 256, 1, 1, 56, 8), ("compact-compact", 128, 128, 3, 2, 56, 16),
    ("dense-compact", 1024, 256, 1, 1, 14, 32), ("compact-compact", 256, 256, 3, 1, 14, 1),
    ("compact-compact", 512, 512, 3, 1, 7, 64), ("compact-dense", 512, 2048, 1, 1, 7, 64),
    ("dense-compact", 24, 144, 1, 1, 56, 18), ("compact-dense", 960, 160, 1, 1, 7, 64),
]  # fmt: skip
DEPTHWISE = [(96, 112, 2, 12), (144, 56, 1, 18), (192, 28, 1, 24), (384, 14, 1, 48), (576, 14, 2, 64), (960, 7, 1, 64)]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("form, c_in, c_out, kernel, stride, size, granularity", CONVS)
def test_convolutions(device, form, c_in, c_out, kernel, stride, size, granularity, precision):
    shape = {
        "c_in": c_in, "c_out": c_out, "kernel": kernel, "stride": stride, "size": (size, size),
        "padding": kernel // 2, "granularity": granularity, "activation": "relu",
        "residual": form == "compact-dense",
    }  # fmt: skip
    # A large batch is slow to check in fp64 and chooses its tiles as the other dtypes of its width do.
    for samples in (1, 5, 32) if precision == "fp16" else (1, 5):
        check_conv(device, form, "random", precision=precision, samples=samples, **shape)
    for kind in ("none", "all", "ragged"):
        check_conv(device, form, kind, precision=precision, samples=5, **shape)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("channels, size, stride, granularity", DEPTHWISE)
def test_depthwise(device, channels, size, stride, granularity, precision):
    for samples, kind in ((1, "random"), (5, "ragged"), (5, "all"), (32, "random")):
        check_depthwise(device, kind, precision=precision, samples=samples, channels=channels, size=(size, size),
                        stride=stride, granularity=granularity, activation="relu6")  # fmt: skip
