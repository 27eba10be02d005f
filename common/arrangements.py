"""
The layers of a network in one word, for the flags and tables of experiments:

    hope               HoPE in all layers
    hope:SSSL:16       the same; three of four layers (S) see the last 16 tokens only
    nope+rope:SSSL:16  no encoding in the L layers, RoPE in the S layers
    nope+rope:SSSL:0   the same without windows
"""
import re

from model import PE


def fields_of(text):
    """PE, PE:PATTERN:WINDOW or PE+LOCAL_PE:PATTERN:WINDOW -> the fields of GPTConfig that it sets.

    Raises ValueError.
    """
    found = re.fullmatch(r"(\w+)(?:(?:\+(\w+))?:([SL]+):(\d+))?", text)
    if not found:
        raise ValueError(f"--pe {text} is not an arrangement of layers: write PE, PE:PATTERN:WINDOW or "
                         "PE+LOCAL_PE:PATTERN:WINDOW, such as nope+rope:SSSL:16")
    pe, local_pe, pattern, window = found.groups()
    for name in (pe, local_pe):
        if name and name not in PE:
            raise ValueError(f"--pe {text}: there is no encoding {name}, choose from {', '.join(PE)}")
    return {"pe": pe} | ({"local_pe": local_pe, "window_pattern": pattern, "window": int(window)} if pattern else {})


def name_of(config):
    """A GPTConfig -> the text that fields_of reads."""
    if "S" not in config.kinds():
        return config.pe
    local = f"+{config.local_pe}" if config.local_pe not in (None, config.pe) else ""
    return f"{config.pe}{local}:{config.window_pattern}:{config.window}"
