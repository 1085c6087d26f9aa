"""An error of a library in the words of the command line: `block_size` 256 becomes --model.block_size 256.

A library speaks of its arguments, in backticks; which flag carries an argument depends on the verb that was typed. An
argument that no flag of the verb carries keeps its name, without the backticks. Commands in backticks (`muonlm info`)
are more than one word and stay as they are.
"""

import re

from muonlm.config.schema import keys

ARGUMENT = re.compile(r"`([a-z_][a-z0-9_]*)`(?P<after> = | )?")
SHORT = {"data.source": "--data"}  # keys with a flag of their own
ARGUMENTS = {"backend": "scan"}  # arguments whose key has another name
SECTIONS = {  # room that raised -> the sections it means by a name that several have: data.name, optim.name
    "data": ("data",),
    "model": ("model",),
    "scan": ("model",),
    "optim": ("optim", "muon", "sched"),
}


def in_flags(error: BaseException, parser) -> str:
    """The text of an error, its arguments written as the flags of this verb's parser."""
    own = {action.dest: action.option_strings[0] for action in reversed(parser.actions) if action.option_strings}
    positional = {action.dest.removesuffix("s") for action in parser.actions if not action.option_strings}
    sections = next((SECTIONS[room] for room in _rooms(error) if room in SECTIONS), ())
    by_key = _keys(sections) if parser.takes_keys else {}

    def flag(found: re.Match) -> str:
        name = found[1]
        if known := by_key.get(ARGUMENTS.get(name, name)) or own.get(name):
            return known + (" " if found["after"] else "")
        if name in positional and found["after"] == " ":  # a value that is typed without a flag
            return ""
        return name + (found["after"] or "")

    return ARGUMENT.sub(flag, str(error))


def _keys(sections: tuple[str, ...]) -> dict[str, str]:
    """Last part of a key -> its flag; of several, that in the first of these sections, else the first of the config."""
    found = {}
    ranked = sorted(keys(), key=lambda key: _rank(key.partition(".")[0], sections))
    for key in reversed(ranked):
        flag = "--" + (key if "." in key else key.replace("_", "-"))
        found[key.rpartition(".")[2]] = SHORT.get(key, flag)
    return found


def _rank(section: str, sections: tuple[str, ...]) -> int:
    return sections.index(section) if section in sections else len(sections)


def _rooms(error: BaseException) -> list[str]:
    """The rooms of muonlm that the error came through, the innermost first."""
    rooms, trace = [], error.__traceback__
    while trace:
        package, _, rest = trace.tb_frame.f_globals.get("__name__", "").partition(".")
        if package == "muonlm" and rest:
            rooms.append(rest.partition(".")[0])
        trace = trace.tb_next
    return rooms[::-1]
