"""What the page on containers shows passes the linters of those who wrote the formats."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

PAGE = (Path(__file__).parent.parent / "docs/how-to/containers.md").read_text()
KUBERNETES = "1.34"


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def manifests():
    return [each for block in blocks("yaml") for each in yaml.safe_load_all(block) if "kind" in each]


def lint(text):
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint: its package has none for this machine")
    done = subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_dockerfile_passes_its_linter_and_a_wrong_one_does_not():
    [dockerfile] = blocks("dockerfile")
    assert lint(dockerfile) == (0, "")
    assert lint(dockerfile.replace(":v0.33.0", ""))[0] == 1


def test_the_dockerfile_has_this_version():
    from kvbm_core import __version__

    [dockerfile] = blocks("dockerfile")
    assert set(re.findall(r"kvbm_core-([\d.]+)-py3", dockerfile)) == {__version__}


def test_the_manifests_are_what_kubernetes_takes():
    assert [each["kind"] for each in manifests()] == ["Service", "StatefulSet"]
    for each in manifests():
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    wrong = manifests()[1]
    wrong["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerport"] = 8000
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_connector_is_configured_as_it_reads_it():
    [argument] = manifests()[1]["spec"]["template"]["spec"]["containers"][0]["args"][2:]
    config = json.loads(argument)
    assert config["kv_connector"] == "KvbmConnector"
    [mount] = [
        each for each in manifests()[1]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if each["name"] == "config"
    ]  # fmt: skip
    assert config["kv_connector_extra_config"]["config"] == f"{mount['mountPath']}/kvbm.yaml"
