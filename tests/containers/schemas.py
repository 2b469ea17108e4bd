"""Check Kubernetes files, unknown keys included; run by tests/containers/check, in the environment that it makes.

python schemas.py --kubernetes 1.37 file.yaml …

Kubernetes' own kinds have JSON schemas (kubernetes-validate). A PyTorchJob is held against the models that the training
operator's SDK is generated with, field by field, and its pods against Kubernetes' schema.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow.training import models

PLAIN = {"str": str, "int": int, "bool": bool}
# Fields that are strings to the models, and enumerations to the operator's custom resource definition.
CHOICES = {
    "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
    "cleanPodPolicy": ("All", "Running", "None"),
}


def kubernetes_errors(document: dict[str, Any], version: str, where: str) -> Iterator[str]:
    """Deviations from the JSON schema of the document's kind."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}: {'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield f"{where}: {error.message}"


def model_errors(value: Any, expected: str, version: str, where: str) -> Iterator[str]:
    """Deviations from the SDK's type ``expected``, such as ``list[V1Container]``."""
    kind, _, inner = expected.rstrip(")]").replace("(", "[").partition("[")
    if kind == "dict":
        if not isinstance(value, dict):
            yield f"{where}: a mapping is wanted, not {value!r}"
            return
        for key, item in value.items():
            yield from model_errors(item, inner.split(", ", 1)[1], version, f"{where}.{key}")
    elif kind == "list":
        if not isinstance(value, list):
            yield f"{where}: a list is wanted, not {value!r}"
            return
        for index, item in enumerate(value):
            yield from model_errors(item, inner, version, f"{where}.{index}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{where}: {kind} is wanted, not {value!r}"
    elif kind == "V1PodTemplateSpec":
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **value}
        yield from kubernetes_errors(pod, version, where)
    elif kind.startswith("KubeflowOrg"):
        model = getattr(models, kind)
        fields = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
        if not isinstance(value, dict):
            yield f"{where}: a mapping is wanted, not {value!r}"
            return
        for key, item in value.items():
            if key not in fields:
                yield f"{where}: unknown key {key!r}; known: {', '.join(fields)}"
            elif item not in CHOICES.get(key, [item]):
                yield f"{where}.{key}: {item!r} is none of {', '.join(CHOICES[key])}"
            else:
                yield from model_errors(item, fields[key], version, f"{where}.{key}")
    elif kind != "V1ObjectMeta":  # any mapping, as for the operator
        yield f"{where}: this check does not know {kind}"


def document_errors(document: dict[str, Any], version: str) -> Iterator[str]:
    """Deviations of one document of a file."""
    where = f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"
    if document.get("apiVersion") == "kubeflow.org/v1" and document.get("kind") == "PyTorchJob":
        yield from model_errors(document, "KubeflowOrgV1PyTorchJob", version, where)
    else:
        yield from kubernetes_errors(document, version, where)


def main() -> int:
    """Check the files of the command line; 1 where one deviates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubernetes", required=True, metavar="VERSION")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    errors = [
        f"{path.name}: {error}"
        for path in options.files
        for document in yaml.safe_load_all(path.read_text())
        for error in document_errors(document, options.kubernetes)
    ]
    print("\n".join(errors), end="\n" * bool(errors))
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
