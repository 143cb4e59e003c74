"""Images, compose file and chart: well-formed, pinned, not root, nothing writable that need not be."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., str]


@pytest.fixture(scope="module")
def services(root: Path) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((root / "docker/compose.yaml").read_text(encoding="utf-8"))[
        "services"
    ]
    return services


def _chart(run: Run, *settings: str) -> list[dict[str, Any]]:
    if not any(setting.startswith(("keys.", "openToAll")) for setting in settings):
        settings = ("keys.secret=keys", *settings)
    arguments = [part for setting in settings for part in ("--set", setting)]
    rendered = run("helm", "template", "candor", "docker/helm/candor", *arguments)
    return [document for document in yaml.safe_load_all(rendered) if document]


def test_dockerfile_lints(run: Run) -> None:
    assert run("hadolint", "docker/Dockerfile") == ""


def test_dockerfile_installs_what_make_installs(root: Path) -> None:
    """The same locks, whoever sets up; tools for development are in no image."""
    locks = [
        set(re.findall(r"requirements/([\w$\{}()-]+)\.txt", (root / file).read_text(encoding="utf-8")))
        for file in ("docker/Dockerfile", "Makefile")
    ]
    assert locks[0] == {"uv", "cpu-torch", "$EXTRA", "demo-model"}
    assert {name.replace("$EXTRA", "$(EXTRA)") for name in locks[0]} < locks[1]


def test_context_holds_what_is_copied_and_no_more(root: Path) -> None:
    dockerfile = (root / "docker/Dockerfile").read_text(encoding="utf-8")
    copied = {
        source.split("/")[0]
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:].split("/")[0] for line in ignored if line.startswith("!")} == copied
    assert [line for line in ignored if line.startswith("!docker")] == ["!docker/healthcheck.py"]
    assert {room.name for room in (root / "candor").iterdir() if room.is_symlink()} < copied
    assert "*" in ignored


def test_compose_file_is_valid(run: Run) -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml")


def test_compose_services_are_pinned_local_and_hardened(services: dict[str, Any]) -> None:
    assert {"candor", "candor-gpu", "prometheus", "alertmanager", "grafana"} == services.keys()
    for name, service in services.items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+(@sha256:\w{64})?$", service["image"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    assert services["candor-gpu"]["profiles"] == ["gpu"]
    assert not any("profiles" in service for name, service in services.items() if name != "candor-gpu")


def test_compose_mounts_exist(root: Path, services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (root / "docker" / source).is_dir(), volume


def test_chart_lints(run: Run) -> None:
    run("helm", "lint", "--strict", "docker/helm/candor", "--set", "keys.secret=keys")


def test_chart_carries_these_rules_and_dashboards(run: Run, root: Path) -> None:
    documents = _chart(run)
    specs = [one["spec"] for one in documents if one["kind"] == "PrometheusRule"]
    data = {
        name: text for one in documents if one["kind"] == "ConfigMap" for name, text in one["data"].items()
    }
    files = (root / "docker/prometheus" / name for name in ("rules.yml", "alerts.yml"))
    assert specs == [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    boards = (root / "docker/grafana/dashboards").glob("*.json")
    assert data == {board.name: board.read_text(encoding="utf-8").rstrip() for board in boards}


def test_chart_runs_as_nobody_on_a_gpu(run: Run) -> None:
    (deployment,) = (one for one in _chart(run) if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"/cache", "/tmp", "/dev/shm", "/keys"}
    assert container["env"] == [{"name": "CANDOR_KEYS", "value": "/keys/keys"}]


def test_chart_opens_to_all_only_where_it_is_said(root: Path) -> None:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed: https://helm.sh/docs/intro/install")

    def render(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [helm, "template", "candor", "docker/helm/candor", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    refused = render()
    assert refused.returncode != 0
    assert "keys.secret: name a Secret" in refused.stderr
    assert 'CANDOR_OPEN_TO_ALL, value: "true"' in render("--set", "openToAll=true").stdout
    for mistyped in ("replica=2", "gpus=many", "settings.lower=1", "image.digest=sha256:12", "keys.name=x"):
        wrong = render("--set", "keys.secret=keys", "--set", mistyped)
        assert wrong.returncode != 0, mistyped
        assert "values don't meet the specifications of the schema" in wrong.stderr


def test_every_value_is_in_the_schema(root: Path) -> None:
    """Also where helm is missing: neither has a name that the other lacks."""
    chart = root / "docker/helm/candor"
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))

    def compare(values: Any, described: Any, path: str) -> None:
        known = described.get("properties", {}) if path != "" else described["properties"]
        if path == "" or not described.get("additionalProperties", True):
            assert set(values) == set(known) - {"global"}, path
            for name, value in values.items():
                if isinstance(value, dict):
                    compare(value, known[name], f"{path}.{name}")

    compare(yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8")), schema, "")


REAL = {
    "one GPU": ("model.claim=models", "model.path=m", "bundle.path=b"),
    "four GPUs, two replicas": (
        "gpus=4",
        "replicas=2",
        "store.secret=db",
        "model.claim=m",
        "model.path=m",
        "bundle.path=b",
    ),
    "CPU": ("gpus=0", "replicas=3", "store.secret=db", "resources.limits.memory=8Gi"),
    "OpenShift": ("runAsUser=null", "gpus=0"),
    "HTTPS": ("tls.secret=tls", "monitoring.keySecret.name=scraper", "monitoring.keySecret.key=key"),
    "ingress": (
        "ingress.enabled=true",
        "ingress.className=nginx",
        "ingress.hosts[0]=candor.example",
        "ingress.tlsSecret=cert",
        r"ingress.annotations.nginx\.ingress\.kubernetes\.io/proxy-buffering=off",
    ),
    "gateway": (
        "gateway.enabled=true",
        "gateway.parentRefs[0].name=public",
        "gateway.hostnames[0]=a.example",
    ),
    "kept files": (
        "settings.CANDOR_STORE=/state/store.db",
        "settings.CANDOR_AUDIT_LOG=/state/audit.jsonl",
        "extraVolumes[0].name=state",
        "extraVolumes[0].persistentVolumeClaim.claimName=state",
        "extraVolumeMounts[0].name=state",
        "extraVolumeMounts[0].mountPath=/state",
    ),
    "environment from secrets": (
        "envFrom[0].secretRef.name=otel",
        "extraEnv[0].name=OTEL_EXPORTER_OTLP_HEADERS",
        "extraEnv[0].valueFrom.secretKeyRef.name=otel",
        "extraEnv[0].valueFrom.secretKeyRef.key=headers",
    ),
    "a runtime class, a digest, annotations": (
        "runtimeClassName=nvidia",
        "priorityClassName=high",
        "image.digest=sha256:" + "0" * 64,
        "podAnnotations.team=a",
        "podLabels.team=a",
    ),
    "scaled by its queue": (
        "autoscaling.enabled=true",
        "store.secret=db",
        "autoscaling.maxReplicas=8",
        "gpus=2",
    ),
    "scaled by KEDA": ("keda.enabled=true", "store.secret=db"),
    "open within a closed cluster": ("openToAll=true", "networkPolicy.from[0].podSelector.matchLabels.app=x"),
}


@pytest.mark.parametrize("name", REAL)
def test_chart_as_people_deploy_it(run: Run, tmp_path: Path, name: str) -> None:
    """Thirteen settings, each rendered and validated, and each says what it is meant to say."""
    documents = _chart(run, *REAL[name])
    file = tmp_path / "chart.yaml"
    foreign = ("monitoring.coreos.com", "gateway.networking.k8s.io", "keda.sh")
    own = [one for one in documents if not one["apiVersion"].startswith(foreign)]
    file.write_text(yaml.safe_dump_all(own), encoding="utf-8")
    run("kubernetes-validate", "--strict", file)

    kinds = {one["kind"]: one for one in documents}
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert kinds["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    shared = any(setting.startswith("store.") for setting in REAL[name])
    egress = [port["port"] for rule in kinds["NetworkPolicy"]["spec"]["egress"] for port in rule["ports"]]
    assert egress == ([5432, 53, 53] if shared else [])
    assert ("CANDOR_STORE_SPOOL" in environment) is shared
    assert kinds["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    https = name == "HTTPS"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == ("HTTPS" if https else "HTTP")
    security = pod["securityContext"]
    assert ("runAsUser" in security) is (name != "OpenShift")
    assert security["runAsNonRoot"] is True
    assert ("CANDOR_OPEN_TO_ALL" in environment) is (name == "open within a closed cluster")
    match name:
        case "four GPUs, two replicas":
            assert environment["CANDOR_VLLM"] == "--tensor-parallel-size 4"
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
        case "CPU":
            assert "nvidia.com/gpu" not in container["resources"]["limits"]
        case "HTTPS":
            assert environment["CANDOR_TLS_KEY"] == "/tls/tls.key"
            assert kinds["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["scheme"] == "https"
        case "ingress":
            [rule] = kinds["Ingress"]["spec"]["rules"]
            assert rule["http"]["paths"][0]["path"] == "/v1/"
            assert kinds["Ingress"]["metadata"]["annotations"]
        case "gateway":
            [route] = kinds["HTTPRoute"]["spec"]["rules"]
            assert route["backendRefs"] == [{"name": "candor", "port": 8000}]
        case "kept files":
            assert {"name": "state", "mountPath": "/state"} in container["volumeMounts"]
        case "environment from secrets":
            assert container["envFrom"] == [{"secretRef": {"name": "otel"}}]
            assert "OTEL_EXPORTER_OTLP_HEADERS" in environment
        case "a runtime class, a digest, annotations":
            assert container["image"].endswith("@sha256:" + "0" * 64)
            assert pod["runtimeClassName"] == "nvidia"
        case "scaled by its queue" | "scaled by KEDA":
            assert "replicas" not in kinds["Deployment"]["spec"]


def test_a_replica_has_the_time_that_it_needs_to_end(root: Path) -> None:
    from candor.app.process.settings import Settings

    values = yaml.safe_load((root / "docker/helm/candor/values.yaml").read_text(encoding="utf-8"))
    fields = Settings.model_fields
    needed = sum(fields[name].default for name in ("shutdown_delay_s", "drain_timeout_s"))
    assert values["terminationSeconds"] >= values["preStopSeconds"] + needed + 20


def test_chart_finds_the_servers_under_the_job_that_alerts_watch(run: Run) -> None:
    documents = {one["kind"]: one for one in _chart(run)}
    monitor, pod = documents["PodMonitor"], documents["Deployment"]["spec"]["template"]["metadata"]
    assert pod["labels"][monitor["spec"]["jobLabel"]] == "candor"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["labels"].items()


def test_chart_with_everything_is_valid_kubernetes(run: Run, tmp_path: Path) -> None:
    documents = _chart(
        run,
        *("model.claim=models", "model.path=m", "bundle.path=b", "gpus=0", "autoscaling.enabled=true"),
        "autoscaling.maxReplicas=1",
        *("keys.secret=keys", "monitoring.keySecret.name=scraper", "monitoring.keySecret.key=key"),
    )
    (monitor,) = (one for one in documents if one["kind"] == "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "scraper", "key": "key"}}
    (deployment,) = (one for one in documents if one["kind"] == "Deployment")
    environment = {
        one["name"]: one["value"] for one in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environment == {
        "CANDOR_MODEL": "/models/m",
        "CANDOR_BUNDLE": "/models/b",
        "CANDOR_KEYS": "/keys/keys",
    }
    assert "replicas" not in deployment["spec"]
    file = tmp_path / "chart.yaml"
    own = [one for one in documents if not one["apiVersion"].startswith("monitoring.coreos.com")]
    assert any(one["kind"] == "HorizontalPodAutoscaler" for one in own)
    file.write_text(yaml.safe_dump_all(own), encoding="utf-8")
    run("kubernetes-validate", "--strict", file)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("gpus=1",), None),
        (("gpus=0",), None),
        (("gpus=4",), "--tensor-parallel-size 4"),
        (
            ("gpus=2", "vllm=--gpu-memory-utilization 0.8"),
            "--tensor-parallel-size 2 --gpu-memory-utilization 0.8",
        ),
        (("vllm=--seed 1",), "--seed 1"),
    ],
)
def test_chart_splits_the_model_over_its_gpus(
    run: Run, settings: tuple[str, ...], expected: str | None
) -> None:
    (deployment,) = (one for one in _chart(run, *settings) if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment.get("CANDOR_VLLM") == expected


def test_chart_names_options_that_the_server_reads(root: Path) -> None:
    """Also where helm is missing: the template sets one variable, by the number of GPUs it reserves."""
    from candor.engine.vllm_options import VARIABLE, read

    chart = root / "docker/helm/candor"
    template = (chart / "templates/deployment.yaml").read_text(encoding="utf-8")
    assert f"name: {VARIABLE}, value" in template
    assert template.count("nvidia.com/gpu: {{ .Values.gpus }}") == 1
    (option,) = re.findall(r'printf "(--[\w-]+) %d" \(int \.Values\.gpus\)', template)
    assert read([option, "4"]) == {"tensor_parallel_size": 4}
    assert yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))["vllm"] == ""
