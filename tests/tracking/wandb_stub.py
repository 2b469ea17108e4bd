"""A stand-in for the W&B service on the loopback: as much of it as the real client and the real agent ask for.

What runs against it shows that the client side works, not that the service accepts it: the stub believes everything.
"""

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

ENTITY = {"id": "E", "name": "me"}
KEY = "0123456789" * 4  # as long as W&B's keys are


def wandb_command(*arguments, cwd, **options):
    """W&B's own command, in a folder where it may leave files."""
    command = [str(Path(sys.executable).parent / "wandb"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options)


def grid(config):
    """Every run of a grid sweep, as the agent is told of it."""
    parameters = config["parameters"]
    choices = [entry["values"] if "values" in entry else [entry["value"]] for entry in parameters.values()]
    for number, values in enumerate(itertools.product(*choices)):
        args = {name: {"value": value} for name, value in zip(parameters, values, strict=True)}
        yield {"type": "run", "run_id": f"sweeprun{number}", "program": config["program"], "args": args}


class Stub(ThreadingHTTPServer):
    """``with Stub() as stub:``; then look at ``runs``, ``artifacts`` and ``asked``.

    Args:
        forbid: answer 403 to everything.
        hang: take requests and answer none of the API's.
        die_after: a GraphQL operation after which the server is gone.
    """

    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that has gone without its answer was killed, or has stopped to wait: that is what is tested."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __init__(self, *, forbid=False, hang=False, die_after=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.forbid, self.hang, self.die_after = forbid, hang, die_after
        self.runs, self.artifacts, self.uploads, self.sweeps, self.asked = {}, {}, {}, {}, []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        self.shutdown()
        self.server_close()

    def run(self, name):
        return self.runs.setdefault(name, {"history": {}, "files": [], "streams": []})

    # One method per operation of the client.

    def Viewer(self, _):
        return {"viewer": {"id": "U", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self, _):
        return {"serverInfo": {"features": []}}

    def RunResumeStatus(self, asked):
        run = self.runs.get(asked["name"])
        if run is None:
            return {"model": {"id": "P", "name": asked["project"], "entity": ENTITY, "bucket": None}}
        lines = [run["history"][offset] for offset in sorted(run["history"])]
        bucket = {
            **{"id": asked["name"], "name": asked["name"], "displayName": run["displayName"], "logLineCount": 0},
            **{
                "summaryMetrics": json.dumps(run.get("summary", {})),
                "config": run.get("config", "{}"),
                "eventsLineCount": 0,
            },
            **{"historyLineCount": len(lines), "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]"},
            **{"tags": run.get("tags", []), "notes": "", "wandbConfig": json.dumps({"t": {}})},
        }
        return {"model": {"id": "P", "name": asked["project"], "entity": ENTITY, "bucket": bucket}}

    def UpsertBucket(self, asked):
        inserted = asked["name"] not in self.runs
        run = self.run(asked["name"])
        run |= {key: value for key, value in asked.items() if value is not None}
        project = {"id": "P", "name": asked["project"], "entity": ENTITY}
        bucket = {"id": asked["name"], "name": asked["name"], "displayName": run["displayName"], "project": project}
        bucket |= {
            "config": run.get("config", "{}"),
            "sweepName": run.get("sweep"),
            "description": "",
            "historyLineCount": 0,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def CreateRunFiles(self, asked):
        self.run(asked["run"])["files"] += asked["files"]
        files = [{"name": name, "uploadUrl": f"{self.url}/up/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def ArtifactType(self, _):
        return {"project": None}

    def CreateArtifact(self, asked):
        name = f"A{len(self.artifacts)}"
        self.artifacts[name] = {**asked["input"], "files": {}}
        return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": {}}}}

    def CreateArtifactManifest(self, asked):
        file = {"id": "F", "uploadUrl": f"{self.url}/up/{asked['artifactID']}/{asked['name']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": file}}}

    UpdateArtifactManifest = CreateArtifactManifest

    def CreateArtifactFiles(self, asked):
        edges = []
        for file in asked["input"]["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            edges.append({"node": {"storagePath": path, "uploadUrl": f"{self.url}/up/{path}", "uploadHeaders": []}})
            edges[-1]["node"] |= {"uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def CommitArtifact(self, asked):
        self.artifacts[asked["artifactID"]]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "0"}}}

    def UpsertSweep(self, asked):
        name = f"sweep{len(self.sweeps)}"
        config = yaml.safe_load(asked["config"])
        self.sweeps[name] = {"config": config, "left": list(grid(config)), "agents": 0}
        sweep = {"id": name, "name": name, "project": {"name": asked["projectName"], "entity": ENTITY}}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def SweepWithRuns(self, asked):
        config = yaml.safe_dump(self.sweeps[asked["sweep"]]["config"])
        sweep = {"id": asked["sweep"], "name": asked["sweep"], "config": config, "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def CreateAgent(self, asked):
        return {"createAgent": {"agent": {"id": asked["sweep"]}}}

    def Heartbeat(self, asked):
        left = self.sweeps[asked["id"]]["left"]
        busy = any(json.loads(asked["runState"]).values())
        commands = [] if busy else [left.pop(0) if left else {"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": asked["id"]}, "commands": json.dumps(commands)}}

    def stream(self, name, body):
        """What a run logs arrives in pieces, each with its place in the file."""
        run = self.run(name)
        run["streams"].append(body)
        files = body.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for line, text in enumerate(history["content"], history["offset"]):
            run["history"][line] = text
        for text in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"] = json.loads(text)
        if body.get("complete"):
            run["exitcode"] = body.get("exitcode")


class Handler(BaseHTTPRequestHandler):
    """Without keep-alive, so that a server that is gone is gone for every connection."""

    server: Stub

    def log_message(self, *args):
        pass

    def _reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self):
        stub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "HEAD":
            return self._reply({})
        if stub.hang:
            time.sleep(300)
        if stub.forbid:
            return self._reply({"errors": [{"message": "permission denied", "code": "PERMISSION_ERROR"}]}, 403)
        if self.path.startswith("/up/"):
            with stub.lock:
                stub.uploads[self.path.removeprefix("/up/")] = body
            return self._reply({})
        if self.path.endswith("/file_stream"):
            with stub.lock:
                stub.stream(self.path.split("/")[-2], json.loads(body))
            return self._reply({"exitcode": None, "limits": {}})
        if self.path != "/graphql":  # W&B's own telemetry, such as /sdk/otel
            return self._reply({}, 404)
        asked = json.loads(body)
        found = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        operation = found[1]
        with stub.lock:
            stub.asked.append((operation, asked.get("variables") or {}))
            answer = getattr(stub, operation, None)
            data = answer(asked.get("variables") or {}) if callable(answer) else None
        error = {} if data is not None else {"errors": [{"message": f"the stub does not know {operation}"}]}
        self._reply({"data": data, **error})
        if operation == stub.die_after:
            stub.die_after = None
            threading.Thread(target=stub.kill).start()
        return None

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815  # named by http.server


if __name__ == "__main__":
    with Stub() as stub:
        print(stub.url, flush=True)
        threading.Event().wait()
