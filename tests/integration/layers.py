#!/usr/bin/env python3
"""Includes under src/ must follow the arrows of docs/design.md. Prints each that does not."""
import pathlib, re, sys

ALLOWED = {
    "util": set(),
    "sandbox": {"util"},
    "memory": {"util"},
    "arch": {"memory", "state", "util"},
    "state": {"util"},
    "engine": {"arch", "memory", "state", "util"},
    "chipset": {"arch", "memory", "state", "util"},
    "block": {"state", "util"},
    "net": {"state", "util"},
    "metadata": {"net", "state", "util"},
    "fs": {"state", "util"},
    "device": {"chipset", "block", "net", "fs", "memory", "state", "util"},
    "machine": {"device", "chipset", "block", "net", "metadata", "fs", "engine", "sandbox", "arch", "memory", "state", "util", "doppel"},
    "control": {"machine", "block", "state", "metadata", "util", "doppel"},
    "agent": set(),
    "cli": {"agent", "block", "control", "machine", "util", "doppel"},
}
source = pathlib.Path(sys.argv[1]) / "src"
wrong = 0
for path in sorted(source.rglob("*.[ch]")):
    folder = path.relative_to(source).parts[0]
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r'#include "([a-z_]+)/', line)
        if found and found[1] != folder and found[1] not in ALLOWED[folder]:
            print(f"{path}:{number}: {folder}/ may not include {found[1]}/")
            wrong += 1
        private = re.match(r'#include "(.*_priv\.h)"', line)
        if private and not private[1].startswith(folder + "/"):
            print(f"{path}:{number}: {private[1]} is private to its folder")
            wrong += 1
sys.exit(1 if wrong else 0)
