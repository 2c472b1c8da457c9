from __future__ import annotations

import json

from mbf import methods


def test_table(mbf) -> None:
    result = mbf("methods")
    assert result.exit_code == 0
    for name in methods.available():
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert methods.get(name).info.title.split()[0] in line


def test_json_has_every_field_and_option(mbf) -> None:
    found = json.loads(mbf("methods", "--json").stdout)
    assert list(found) == methods.available()
    assert found["slao"]["options"]["schedule"]["default"] == "1/sqrt(i)"
    assert found["slao"]["merge"] == methods.get("slao").info.merge
