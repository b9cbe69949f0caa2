"""What one process of a pass runs: a network in one form."""

from __future__ import annotations

from dataclasses import dataclass

from .setting import MASKED, Setting, Variant, pruned_name


@dataclass(frozen=True)
class Dense:
    """The network on the dense engine `on`."""

    on: str

    @property
    def name(self) -> str:
        return self.on


@dataclass(frozen=True)
class Pruned:
    """The network statically pruned to a density, at the first gate and granularity, on the dense engine `on`."""

    density: float
    on: str

    @property
    def name(self) -> str:
        return pruned_name(self.density)


@dataclass(frozen=True)
class Masked:
    """The network with masks multiplied onto dense convolutions: hard mode of the first of ours."""

    variant: Variant

    @property
    def name(self) -> str:
        return MASKED


@dataclass(frozen=True)
class Sparse:
    """One model of ours, and all that it runs; every variant has the same gate and granularity."""

    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        return self.variants[0].name


Job = Dense | Pruned | Masked | Sparse


def sparse(setting: Setting) -> list[Sparse]:
    """Ours: each gate and granularity is one model for all densities, as in service.

    A model for each density is made where it is tuned, which is true to one density, and where masks are to be known:
    the room for what is kept is the model's, and with others in it not all would be.
    """
    found = []
    for gate in setting.gates:
        for granularity in setting.granularities:
            variants = [Variant(gate, granularity, density) for density in setting.densities]
            found += [Sparse((variant,)) for variant in variants] if setting.tune else [Sparse(tuple(variants))]
            if setting.known_masks and gate == setting.gates[0]:
                known = [Variant(gate, granularity, density, known_masks=True) for density in setting.densities]
                found += [Sparse((variant,)) for variant in known if variant.density < 1]
    return found
