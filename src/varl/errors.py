"""What can be wrong with what a user hands us. Each message names the value, the reason and the fix."""


class VarlError(Exception):
    """Base of the errors that VARL raises on purpose; the command line prints them without a traceback."""


class ConfigError(VarlError, ValueError):
    """A setting that is unknown, impossible, or contradicts another."""


class DataError(VarlError, ValueError):
    """A prompt, picture, font, word list or data folder that cannot be used."""


class CheckpointError(VarlError, RuntimeError):
    """A file of weights or of run state that is missing, damaged, or made for another model."""


class NumericsError(VarlError, ArithmeticError):
    """A run that would go on with numbers that mean nothing: NaN, a replay that does not agree, nothing to learn from."""


class RewardError(VarlError, RuntimeError):
    """A reward that cannot be computed: engine missing, too many failures."""
