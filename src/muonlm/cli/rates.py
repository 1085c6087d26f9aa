"""`muonlm info --convert-lr`: the same update under another lr mode, or under AdamW."""

import math
import re

from muonlm.errors import UserError


def convert(lr: str, wd: str | None, from_mode: str | None, to_mode: str | None, shape: str | None) -> dict:
    """The words as typed -> the same update in another lr mode, for one shape or for those of a d_model of 768."""
    from muonlm.optim.rates import MODES, convert_lr

    usage = "muonlm info --convert-lr 0.02 --from original --to match_rms_adamw --shape 768x768 --wd 0.05"
    if not (from_mode and to_mode):
        raise UserError(f"--convert-lr needs --from and --to, each one of {', '.join(MODES)}; as in: {usage}")
    numbers = []
    for flag, text in (("--convert-lr", lr), ("--wd", wd or "0")):
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(math.nan)
        if not 0.0 <= numbers[-1] < math.inf:
            raise UserError(f"{flag} {text!r} is not a number >= 0; as in: {usage}")
    if shape and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(f"--shape {shape!r} is not rows x columns, as nn.Linear stores them; as in: {usage}")
    shapes = [tuple(map(int, shape.split("x")))] if shape else [(768, 768), (3072, 768), (768, 3072)]
    table = []
    for one in shapes:
        new_lr, new_wd = convert_lr(*numbers, one, from_mode, to_mode)
        as_adamw, _ = convert_lr(numbers[0], 0.0, one, from_mode, "adamw")
        table.append({"shape": list(one), "lr": new_lr, "wd": wd and new_wd, "update_rms": 0.2 * as_adamw})
    return {"from": {"mode": from_mode, "lr": numbers[0], "wd": wd and numbers[1]}, "to": to_mode, "conversions": table}


def as_text(facts: dict) -> str:
    old, to, table = facts["from"], facts["to"], facts["conversions"]
    if len(table) == 1:
        one, size = table[0], "x".join(map(str, table[0]["shape"]))
        before, after = (
            f"lr {r['lr']:.6g}" + (f" with wd {r['wd']:.6g}" if r["wd"] is not None else "") for r in (old, one)
        )
        decay = "; add --wd if you use weight decay: it must be divided by what lr is multiplied by."
        if old["wd"] is not None:
            decay = f" and shrink them by lr x wd = {old['lr'] * old['wd']:.3g}."
        return (
            f"{before} under {old['mode']}  =  {after} under {to}, for a matrix of {size}.\n"
            f"Both move its entries by {one['update_rms']:.3g} (RMS) a step{decay}"
        )
    keys = ["lr", "update_rms"] if old["wd"] is None else ["lr", "wd", "update_rms"]
    lines = [f"under {old['mode']}: " + ", ".join(f"{k} {old[k]:.6g}" for k in keys[:-1]), f"under {to}:"]
    lines += ["  matrix    " + "".join(f"{k.replace('_rms', ' RMS'):>14}" for k in keys)]
    lines += [f"  {'x'.join(map(str, r['shape'])):10}" + "".join(f"{r[k]:14.6g}" for k in keys) for r in table]
    if len({f"{r['lr']:.6g}" for r in table}) > 1:
        lines.append(
            "The rate depends on the shape: one for all is exact for one only. --shape ROWSxCOLUMNS asks for yours."
        )
    return "\n".join(lines)
