"""What every value of a setting must be."""

from varl.errors import ConfigError


def demand(name: str, value: int | float, holds: bool, wanted: str) -> None:
    """ConfigError unless it `holds`: what the value must be is `wanted`."""
    if not holds:
        raise ConfigError(f"{name}={value}: must be {wanted}.")
