"""A file of bench.gpu with little in it, for tests of what is made of one."""


def content_with(layers=None, networks=None, operators=None, failed=0):
    return {
        "dry_run": False, "machine": {"device": "NVIDIA X", "torch": "2", "triton": "3"}, "commit": None,
        "sources": "0" * 12, "ceilings": None, "layers": layers or {}, "networks": networks or {},
        "spent": {"layers": 61.2}, "done": {}, "notes": {}, "profile": {}, "tune": {}, "training": {},
        "parity": {"passed": 5, "skipped": 0, "failed": failed, "not_run": 0, "operators": operators or {},
                   "failures": [{"test": "a.py::b", "message": "wrong\nby 3"}] * failed, "skips": []},
    }  # fmt: skip
