"""``kubernetes.yaml``: the server of a package in a cluster, by default reachable only from its namespace.

It meets Kubernetes' ``restricted`` Pod Security Standard, and has no writable files except ``/tmp``.
"""

from typing import Any

from evit_deploy.serving.deployment import (
    EXIT_TIMEOUT,
    GRPC,
    HTTP,
    METRICS,
    SHARED_MEMORY_GIB,
    USER,
    Launch,
    documents,
)

DRAIN = 15
"""Seconds between leaving the Service and SIGTERM, in which new requests may still arrive."""
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
"""Label of the pods that may read the metrics, as set by Prometheus' own charts."""


def kubernetes(launch: Launch) -> str:
    """Returns the Deployment, Services, NetworkPolicy and PodDisruptionBudget as YAML.

    Args:
        launch: Settings for starting the server.
    """
    tag = launch.tag
    chosen = {"app": tag}
    deployment = _object("apps/v1", "Deployment", tag, chosen) | {
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": chosen},
            "template": {"metadata": {"labels": chosen}, "spec": _pod(launch)},
        }
    }
    service = _object("v1", "Service", tag, chosen) | {
        "spec": {
            "type": "LoadBalancer" if launch.publish == "network" else "ClusterIP",
            "selector": chosen,
            "ports": [_service_port("http", HTTP), _service_port("grpc", GRPC)],
        }
    }
    metrics = _object("v1", "Service", f"{tag}-metrics", chosen) | {
        "spec": {"type": "ClusterIP", "selector": chosen, "ports": [_service_port("metrics", METRICS)]}
    }
    # Not `minAvailable: 1`, which with one replica would block draining a node.
    budget = _object("policy/v1", "PodDisruptionBudget", tag, chosen) | {
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": chosen}}
    }
    return documents(deployment, service, metrics, _network_policy(launch, chosen), budget)


def _object(version: str, kind: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}}


def _pod(launch: Launch) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if launch.pillow is not None or launch.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": f"{SHARED_MEMORY_GIB}Gi"}
        volumes.append({"name": "shared-memory", "emptyDir": memory})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    resources: dict[str, Any] = {"cpu": str(launch.cpus), "memory": f"{launch.memory}Gi"}
    if launch.on_gpu:
        resources["nvidia.com/gpu"] = 1
    container = {
        "name": "triton",
        "image": launch.tag,
        "args": launch.arguments(),
        "ports": [
            {"name": name, "containerPort": port}
            for name, port in (("http", HTTP), ("grpc", GRPC), ("metrics", METRICS))
        ],
        "startupProbe": _probe("ready") | {"periodSeconds": 5, "failureThreshold": 60},
        "readinessProbe": _probe("ready") | {"periodSeconds": 5},
        "livenessProbe": _probe("live") | {"periodSeconds": 10, "failureThreshold": 3},
        # On SIGTERM the server stops listening at once, so it must have left the Service's endpoints before.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(DRAIN)]}}},
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": DRAIN + EXIT_TIMEOUT + 15,
        "containers": [container],
        "volumes": volumes,
    }


def _network_policy(launch: Launch, chosen: dict[str, str]) -> dict[str, Any]:
    """Allows requests from pods of the same namespace and Prometheus' scrapes of the metrics, and no egress."""
    requests: dict[str, Any] = {"ports": [_policy_port(HTTP), _policy_port(GRPC)]}
    if launch.publish != "network":
        requests["from"] = [{"podSelector": {}}]
    prometheus = {"namespaceSelector": {}, "podSelector": {"matchLabels": PROMETHEUS}}
    return _object("networking.k8s.io/v1", "NetworkPolicy", launch.tag, chosen) | {
        "spec": {
            "podSelector": {"matchLabels": chosen},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [requests, {"from": [prometheus], "ports": [_policy_port(METRICS)]}],
            "egress": [],
        }
    }


def _probe(what: str) -> dict[str, Any]:
    return {"httpGet": {"path": f"/v2/health/{what}", "port": "http"}, "timeoutSeconds": 5}


def _service_port(name: str, port: int) -> dict[str, Any]:
    return {"name": name, "port": port, "targetPort": name}


def _policy_port(port: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": port}
