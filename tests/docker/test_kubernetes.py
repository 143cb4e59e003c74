"""Several replicas on Kubernetes: what the chart asks for, and the examples beside it, held to their schemas.

The schemas of others' resources are not ours to ship: `CRDS=DIR pytest tests/docker/test_kubernetes.py` takes a
folder with the custom resource definitions of KubeRay, KServe, KEDA and the inference gateway, one a file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

Run = Callable[..., str]

EXAMPLES = ("rayservice.yaml", "kserve.yaml", "gateway.yaml")


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def strict(schema: Any) -> Any:
    """As the API server has it under strict validation: a field that no schema names is an error."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made = {"type": ["integer", "string"]}
    return made


def schemas(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(folder.glob("*.yaml")):
        for one in documents(file):
            spec = one["spec"]
            for version in spec["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                yield f"{spec['group']}/{version['name']} {spec['names']['kind']}", schema


@pytest.fixture(scope="session")
def crds() -> dict[str, Any]:
    if "CRDS" not in os.environ:
        pytest.skip("set CRDS to a folder of custom resource definitions")
    return dict(schemas(Path(os.environ["CRDS"])))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_their_operators_take(root: Path, crds: dict[str, Any], name: str) -> None:
    known = 0
    for one in documents(root / "docker/kubernetes" / name):
        schema = crds.get(f"{one['apiVersion']} {one['kind']}")
        if schema is not None:
            jsonschema.validate(one, schema)
            known += 1
            wrong = {**one, "spec": {**one["spec"], "misnamed": 1}}
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema)
    assert known == 1


def test_scaled_object_is_what_keda_takes(run: Run, crds: dict[str, Any]) -> None:
    arguments = ("--set", "keys.secret=k", "--set", "keda.enabled=true", "--set", "store.secret=db")
    rendered = run("helm", "template", "candor", "docker/helm/candor", *arguments)
    (scaled,) = (one for one in yaml.safe_load_all(rendered) if one and one["kind"] == "ScaledObject")
    jsonschema.validate(scaled, crds["keda.sh/v1alpha1 ScaledObject"])


def test_its_query_asks_for_what_the_server_has(root: Path, run: Run, tmp_path: Path) -> None:
    arguments = ("--set", "keys.secret=k", "--set", "keda.enabled=true", "--set", "store.secret=db")
    rendered = run("helm", "template", "candor", "docker/helm/candor", *arguments)
    (scaled,) = (one for one in yaml.safe_load_all(rendered) if one and one["kind"] == "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    rules = {"groups": [{"name": "keda", "rules": [{"record": "waiting", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    labels = 'namespace="default",pod="candor-1"'
    standing = f'sdm_certificate_standing{{standing="suspended",alpha="%s",{labels}}}'

    def unit(suspended: tuple[int, ...], expected: float) -> dict[str, Any]:
        series = [{"series": f"vllm:num_requests_waiting{{{labels}}}", "values": "12 12"}]
        for number, value in enumerate(suspended):
            series.append({"series": standing % number, "values": f"{value} {value}"})
        samples = [{"labels": "{}", "value": expected}]
        return {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [{"expr": query, "eval_time": "1m", "exp_samples": samples}],
        }

    tests = [unit((), 12), unit((0, 0), 12), unit((0, 1), 12), unit((1, 1), 0)]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": tests}))
    run("promtool", "test", "rules", tmp_path / "tests.yml")


@pytest.mark.parametrize(
    "settings",
    [
        ("replicas=2",),
        ("autoscaling.enabled=true",),
        ("keda.enabled=true",),
        ("keda.enabled=true", "autoscaling.enabled=true", "store.secret=db"),
    ],
)
def test_several_replicas_without_a_store_are_refused(root: Path, settings: tuple[str, ...]) -> None:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed: https://helm.sh/docs/intro/install")
    command = [helm, "template", "candor", "docker/helm/candor", "--set", "keys.secret=keys"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    if len(settings) == 1:
        assert "store" in done.stderr.rpartition("Error:")[2]
        command += ["--set", "store.secret=db"]
        assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0


def test_the_values_schema_refuses_them_where_helm_is_missing(root: Path) -> None:
    chart = root / "docker/helm/candor"
    schema = yaml.safe_load((chart / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)
    several = {**values, "replicas": 2}
    with pytest.raises(jsonschema.ValidationError) as refused:
        jsonschema.validate(several, schema)
    assert list(refused.value.absolute_path) == ["store", "secret"]
    jsonschema.validate({**several, "store": {**values["store"], "secret": "db"}}, schema)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_sound_pods_and_settings_that_there_are(
    root: Path, run: Run, tmp_path: Path, name: str
) -> None:
    from candor.app.process.settings import Settings

    pods: list[dict[str, Any]] = []
    given: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "containers" in value:
                pods.append(value)
            for key, inner in value.items():
                given.update(
                    word for word in (key, inner) if isinstance(word, str) and word.startswith("CANDOR_")
                )
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for one in documents(root / "docker/kubernetes" / name):
        walk(one)
        if one["kind"] == "RayService":
            serving = yaml.safe_load(one["spec"]["serveConfigV2"])
            walk(serving)
            application = serving["applications"][0]
            assert application["import_path"] == "candor.app.process.cluster:application"
            cluster = pytest.importorskip("candor.app.process.cluster", exc_type=ImportError)
            cluster.Shape.model_validate(application["args"])
    assert given <= {f"CANDOR_{field.upper()}" for field in Settings.model_fields}
    assert ("CANDOR_STORE" in given) is (name != "gateway.yaml")
    of_kserve = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")
    for number, pod in enumerate(pods):
        spec = {field: value for field, value in pod.items() if field not in of_kserve}
        file = tmp_path / f"{number}.yaml"
        file.write_text(
            yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec})
        )
        run("kubernetes-validate", "--strict", file)
