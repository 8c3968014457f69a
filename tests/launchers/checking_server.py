"""A checking server: it speaks enough of the Kubernetes API for the real Python client, and refuses what does not fit.

It is not a real API server. Custom kinds are held to their public CustomResourceDefinitions (unknown fields, types,
required fields, enums, defaults, and CEL rules where no old object is needed), core kinds to the schemas of
`kubernetes-validate`, strictly. No controller runs: tests play it through `set_status`, `add_pod` and `let_go`.
"""

import copy
import functools
import json
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import celpy
import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.37"
CORE = {"configmaps": ("v1", "ConfigMap"), "pods": ("v1", "Pod"), "jobs": ("batch/v1", "Job")}
DEFINITIONS = {
    "jobsets": "jobset.yaml",
    "trainjobs": "trainjobs.yaml",
    "trainingruntimes": "trainingruntimes.yaml",
    "rayjobs": "rayjobs.yaml",
    "localqueues": "localqueues.yaml",
}
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?P<log>/log)?"
)
Tree = dict[str, Any]

# ------------------------------------------------------------------------------------------------- checking


@functools.cache
def definition(folder: Path, plural: str) -> Tree:
    """A public CustomResourceDefinition."""
    text = (folder / DEFINITIONS[plural]).read_text(encoding="utf-8")
    tree: Tree = yaml.load(text, Loader=yaml.CSafeLoader)
    return tree


def schema_of(folder: Path, plural: str, api_version: str) -> Tree:
    """Its schema for one version. Raises KeyError for a version that does not exist or is not served."""
    tree = definition(folder, plural)
    group, _, version = api_version.partition("/")
    assert tree["spec"]["group"] == group, (api_version, tree["spec"]["group"])
    served = {
        entry["name"]: entry["schema"]["openAPIV3Schema"] for entry in tree["spec"]["versions"] if entry["served"]
    }
    schema: Tree = served[version]
    return schema


@functools.cache
def validator(folder: Path, plural: str, api_version: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(as_json_schema(schema_of(folder, plural, api_version)))


def as_json_schema(schema: Any) -> Any:
    """OpenAPI's dialect in JSON Schema's: nullable, int-or-string."""
    if isinstance(schema, list):
        return [as_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    told = {key: as_json_schema(value) for key, value in schema.items()}
    if told.pop("x-kubernetes-int-or-string", False):
        told.pop("type", None)
        told.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if told.get("nullable") is True and "type" in told:
        told["type"] = [told["type"], "null"]
    return told


def complaints(tree: Tree, folder: Path) -> list[str]:
    """Why an object is refused; its defaults are filled in."""
    plural = f"{tree['kind'].lower()}s"
    if plural not in DEFINITIONS:
        try:
            kubernetes_validate.validate(tree, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{'.'.join(map(str, error.path))}: {error.message}"]
        return []
    schema = schema_of(folder, plural, tree["apiVersion"])
    found = list(unknown_fields(tree, schema, ""))
    fill_defaults(tree, schema)
    checked = validator(folder, plural, tree["apiVersion"]).iter_errors(tree)
    found += [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in checked]
    return found + list(broken_rules(tree, schema, ""))


def unknown_fields(tree: Any, schema: Tree, where: str) -> Iterator[str]:
    if isinstance(tree, list):
        for position, item in enumerate(tree):
            yield from unknown_fields(item, schema.get("items", {}), f"{where}[{position}]")
    if not isinstance(tree, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, value in tree.items():
        if key in known:
            # the server's own part, which definitions leave open
            if where or key != "metadata":
                yield from unknown_fields(value, known[key], f"{where}.{key}".lstrip("."))
        elif isinstance(others, dict):
            yield from unknown_fields(value, others, f"{where}.{key}")
        elif not others:
            yield f'unknown field "{f"{where}.{key}".lstrip(".")}"'


def fill_defaults(tree: Any, schema: Tree) -> None:
    if isinstance(tree, list):
        for item in tree:
            fill_defaults(item, schema.get("items", {}))
    elif isinstance(tree, dict):
        for key, below in schema.get("properties", {}).items():
            if key not in tree and "default" in below:
                tree[key] = copy.deepcopy(below["default"])
            if key in tree:
                fill_defaults(tree[key], below)


@functools.cache
def program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def broken_rules(tree: Any, schema: Tree, where: str) -> Iterator[str]:
    """CEL rules that do not hold; those about a change are not for a new object."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            continue
        if not program(rule["rule"]).evaluate({"self": celpy.json_to_cel(tree)}):
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in schema.get("properties", {}):
                yield from broken_rules(value, schema["properties"][key], f"{where}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for position, item in enumerate(tree):
            yield from broken_rules(item, schema.get("items", {}), f"{where}[{position}]")


# -------------------------------------------------------------------------------------------------- serving


class CheckingServer:
    """Objects by (plural, namespace, name); `trouble` answers a (method, plural) with a status of its own."""

    def __init__(self, definitions: Path) -> None:
        self.definitions = definitions
        self.objects: dict[tuple[str, str, str], Tree] = {}
        self.logs: dict[str, str] = {}
        self.trouble: dict[tuple[str, str], int] = {}
        self.passing: set[tuple[str, str]] = set()  # trouble that is over after one answer
        self.holding = False  # keep what is deleted until let_go(), as pods that save do
        self.asked: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="checking server", daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path) -> Path:
        """What a user's client reads to find this server."""
        named = {"name": "checking"}
        tree = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "checking",
            "clusters": [named | {"cluster": {"server": self.url}}],
            "users": [named | {"user": {}}],
            "contexts": [named | {"context": {"cluster": "checking", "user": "checking"}}],
        }
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def set_status(self, plural: str, namespace: str, name: str, status: Tree) -> None:
        """Play the controller; a status that its schema does not allow fails the test."""
        tree = copy.deepcopy(self.objects[plural, namespace, name]) | {"status": status}
        assert not (found := complaints(tree, self.definitions)), found
        self.objects[plural, namespace, name] = tree

    def add_pod(self, namespace: str, name: str, template: Tree, status: Tree, log: str = "", **labels: str) -> None:
        """Play a controller that makes a pod, and the node that runs it."""
        metadata = copy.deepcopy(template.get("metadata", {})) | {"name": name, "namespace": namespace}
        metadata["labels"] = {**metadata.get("labels", {}), **labels}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": status}
        assert not (found := complaints(pod, self.definitions)), found
        self.objects["pods", namespace, name], self.logs[name] = pod, log

    def let_go(self) -> None:
        """The pods of what was deleted have left."""
        self.holding = False
        for key in [key for key, tree in self.objects.items() if "deletionTimestamp" in tree["metadata"]]:
            self.remove(key)

    def remove(self, key: tuple[str, str, str]) -> None:
        """Delete for good, with what it owns."""
        uid = self.objects.pop(key)["metadata"]["uid"]
        for other, tree in list(self.objects.items()):
            if any(owner["uid"] == uid for owner in tree["metadata"].get("ownerReferences", [])):
                self.remove(other)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, state: CheckingServer, *arguments: Any) -> None:
        self.state = state
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, tree: Tree | str) -> None:
        body = tree.encode() if isinstance(tree, str) else json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(tree, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, reason: str, message: str) -> None:
        told = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
        self._answer(status, told | {"code": status})

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        place = PATH.fullmatch(url.path)
        if place is None or place["plural"] not in (CORE | DEFINITIONS):
            return self._refuse(404, "NotFound", "the server could not find the requested resource")
        asked = (self.command, place["plural"])
        self.state.asked.append(asked)
        if status := self.state.trouble.get(asked):
            if asked in self.state.passing:
                del self.state.trouble[asked]
            return self._refuse(status, "Trouble", "this test's trouble")
        return getattr(self, f"_{self.command.lower()}")(place, json.loads(body or "{}"), parse_qs(url.query))

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def _get(self, place: re.Match[str], _: Tree, query: dict[str, list[str]]) -> None:
        if place["name"] is None:
            wanted = dict(part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part)
            items = [
                tree
                for (plural, namespace, _), tree in self.state.objects.items()
                if (plural, namespace) == (place["plural"], place["namespace"])
                and wanted.items() <= tree["metadata"].get("labels", {}).items()
            ]
            return self._answer(200, {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items})
        tree = self.state.objects.get((place["plural"], place["namespace"], place["name"]))
        if tree is None:
            return self._refuse(404, "NotFound", f'{place["plural"]} "{place["name"]}" not found')
        if place["log"]:
            lines = self.state.logs[place["name"]].splitlines(keepends=True)
            return self._answer(200, "".join(lines[-int(query.get("tailLines", ["1000000"])[0]) :]))
        return self._answer(200, tree)

    def _post(self, place: re.Match[str], tree: Tree, query: dict[str, list[str]]) -> None:
        key = (place["plural"], place["namespace"], tree["metadata"]["name"])
        assert query.get("fieldValidation") == ["Strict"], "a misspelt field would be dropped in silence"
        expected = (place["group"] or "v1", f"{tree['kind'].lower()}s")
        if (tree["apiVersion"], place["plural"]) != expected:
            return self._refuse(400, "BadRequest", f"{tree['apiVersion']} {tree['kind']} sent to {self.path}")
        if key in self.state.objects:
            return self._refuse(409, "AlreadyExists", f'{key[0]} "{key[2]}" already exists')
        if found := complaints(tree, self.state.definitions):
            return self._refuse(422, "Invalid", f'{tree["kind"]} "{key[2]}" is invalid: {"; ".join(found[:8])}')
        tree["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.state.objects[key] = tree
        return self._answer(201, tree)

    def _patch(self, place: re.Match[str], change: Tree, _: dict[str, list[str]]) -> None:
        key = (place["plural"], place["namespace"], place["name"])
        if key not in self.state.objects:
            return self._refuse(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        tree = _merged(self.state.objects[key], change)
        if found := complaints(tree, self.state.definitions):
            return self._refuse(422, "Invalid", "; ".join(found))
        self.state.objects[key] = tree
        return self._answer(200, tree)

    def _delete(self, place: re.Match[str], options: Tree, query: dict[str, list[str]]) -> None:
        key = (place["plural"], place["namespace"], place["name"])
        if key not in self.state.objects:
            return self._refuse(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        asked = query.get("propagationPolicy", [options.get("propagationPolicy")])[0]
        assert asked == "Foreground", "else the job is gone before its pods have saved"
        self.state.objects[key]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z"
        if not self.state.holding:
            self.state.remove(key)
        return self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})


def _merged(tree: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    whole = dict(tree) if isinstance(tree, dict) else {}
    for key, value in change.items():
        if value is None:
            whole.pop(key, None)
        else:
            whole[key] = _merged(whole.get(key), value)
    return whole
