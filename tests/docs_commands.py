"""The commands that the documentation's shell blocks meet when tests/test_docs.py runs them.

A block runs in bash with a PATH that holds only what `install` puts there: a few tools as they are, `lalia`, and
stand-ins for what cannot run inside a test (STAND_INS). Any other command is "not found", which fails the test.

`lalia` here is a client: it hands its arguments, folder, environment and files to a process that has imported lalia
once and forks for every command (importing PyTorch 50 times would take minutes). The fork calls `lalia.cli.main`, as
the installed program does. Before that, `miniature` makes the command small.
"""

import array
import contextlib
import importlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

TOOLS = ("cat", "cp", "curl", "head", "ls", "mkdir", "python", "tail")
"""Programs that run as they are."""

STAND_INS = {
    "pip": "installs packages, from the network; checked instead: the extras it names are in pyproject.toml",
    "lalia pull": "fetches up to 100 MB from the network; checked instead: the command itself, with the model that "
    "`make demo` made in the place of what would be fetched. tests/formats/test_pull.py has the fetching",
    "make": "`make demo` runs for real, in miniature, less its installation; other targets would build environments or "
    "run these very tests, so `make -n` must accept them",
    "torchrun": "starts Python with PyTorch in every process, which takes long; the processes are forked here instead, "
    "and train together as there. tests/training/faults/test_processes.py runs the real one",
    "sbatch": "hands a script to Slurm; here bash runs it, with a srun and a scontrol that know one machine",
    "sky": "rents machines; checked instead: the task's file, and that bash can read its scripts",
    "python -m lalia.ray_train": "starts a cluster; checked instead: its arguments. tests/test_ray_train.py runs it",
    ".venv/bin/activate": "the tests' PATH already has lalia; `make demo` makes the environment it belongs to",
}
"""What is not executed as it stands, and why."""

RECIPE_VERBS = ("run", "collect", "tokenize", "pretrain", "finetune", "evaluate", "plan")
PLAN_OPTIONS = ("--minutes", "--budget", "--device", "--devices")
"""What only `lalia plan` takes, each with a value."""
CHAT_LINES = b"Hello!\nWho are you?\n"
"""What `lalia chat` reads where a person would type."""

PRELOADED = (
    "lalia.cli",
    "lalia.data.collect",
    "lalia.evaluation.evaluate",
    "lalia.evaluation.publish",
    "lalia.planner",
    "lalia.posttraining.finetune",
    "lalia.serving.server",
    "lalia.training.pretrain",
    "torch._dynamo",  # optimizers import it, which takes seconds
)
"""What the process behind the client imports before it forks."""

SERVER_SECONDS = 30.0
ROOT = Path(__file__).parents[1]


def install(folder: Path, settings: list[str]) -> Path:
    """Write the commands into `folder`/bin, and what they share into `folder`; returns the bin folder.

    Args:
        settings: overrides that make a recipe small.
    """
    bin_folder = folder / "bin"
    bin_folder.mkdir(parents=True)
    for name in TOOLS:
        program = sys.executable if name == "python" else _which(name)
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{program}" "$@"\n', encoding="utf-8")
    for name in ("lalia", "pip", "make", "torchrun", "sbatch", "srun", "scontrol", "sky", "ray_train"):
        (bin_folder / name).write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from docs_commands import Path, {name}\nsys.exit({name}(Path({str(folder)!r}), sys.argv[1:]))\n",
            encoding="utf-8",
        )
    (bin_folder / "python").write_text(
        f'#!/bin/sh\nif [ "$1 $2" = "-m lalia.ray_train" ]; then shift 2; exec ray_train "$@"; fi\n'
        f'exec "{sys.executable}" "$@"\n',
        encoding="utf-8",
    )
    for path in bin_folder.iterdir():
        path.chmod(0o755)
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return bin_folder


def lalia(folder: Path, arguments: list[str]) -> int:
    """The client; `lalia serve` goes to the background and is waited for until it answers."""
    if arguments[:1] == ["serve"]:
        return _serve(folder, arguments)
    with _request(folder, arguments, (0, 1, 2)) as connection:
        answer = connection.recv(1)
    return answer[0] if answer else 70


def pip(folder: Path, arguments: list[str]) -> int:
    """Check that what is to be installed is Lalia with extras that exist, or a package pinned in the Makefile."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = [a for a in arguments[1:] if not a.startswith("-") and not a.endswith("constraints.txt")]
    for name in names:
        project, _, rest = name.partition("[")
        asked = [extra.strip() for extra in rest.rstrip("]").split(",") if extra]
        unknown = [extra for extra in asked if extra not in extras]
        if project not in (".", "lalia") or unknown:
            print(
                f"pip (stand-in): {name!r} is neither this project nor one of its extras {list(extras)}",
                file=sys.stderr,
            )
            return 1
    return 0 if arguments[:1] == ["install"] and names else 1


def make(folder: Path, arguments: list[str]) -> int:
    """`make demo` with an environment that counts as installed; other targets printed by make, not run."""
    command = [_which("make"), "-C", str(ROOT), "--no-print-directory", *arguments]
    if arguments[:1] == ["demo"]:
        command += [f"VENV={folder / 'venv'}", f"RUN={Path.cwd() / 'runs' / 'shakespeare'}"]
    else:
        command.append("-n")
    return subprocess.run(command, check=False).returncode


def torchrun(folder: Path, arguments: list[str]) -> int:
    """The processes of one machine, each a client in a process of its own."""
    options, verb = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    known = {f"--rdzv-{name}" for name in ("backend", "endpoint", "id")}
    known |= {"--nnodes", "--nproc-per-node", "--max-restarts", "--shutdown-timeout"}
    names = options[:-1:2]
    if options[-1:] != ["-m"] or verb[:1] != ["lalia"] or not {*names} <= known:
        print(f"torchrun (stand-in): expected {sorted(known)} and -m -- lalia VERB; got {arguments}", file=sys.stderr)
        return 2
    size = int(options[options.index("--nproc-per-node") + 1])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            os._exit(lalia(folder, verb[1:]))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def sbatch(folder: Path, arguments: list[str]) -> int:
    """The script itself, on one machine with two processes."""
    script = next(i for i, argument in enumerate(arguments) if argument.endswith(".sbatch"))
    place = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "PROCESSES_PER_NODE": "2"}
    command = ["/bin/bash", *arguments[script:]]
    return subprocess.run(command, env=os.environ | place, check=False).returncode


def srun(folder: Path, arguments: list[str]) -> int:
    """What follows the options."""
    command = next(i for i, argument in enumerate(arguments) if not argument.startswith("-"))
    return subprocess.run(arguments[command:], check=False).returncode


def scontrol(folder: Path, arguments: list[str]) -> int:
    """Names this machine."""
    print("localhost")
    return 0 if arguments[:2] == ["show", "hostnames"] else 1


def sky(folder: Path, arguments: list[str]) -> int:
    """Read the task and its scripts as SkyPilot and bash would."""
    script = (
        "import subprocess, sys, yaml\n"
        "task = yaml.safe_load(open(sys.argv[1]))\n"
        "missing = {'name', 'resources', 'num_nodes', 'setup', 'run', 'envs'} - task.keys()\n"
        "assert not missing, missing\n"
        "for part in ('setup', 'run'):\n"
        "    subprocess.run(['/bin/bash', '-n', '-c', task[part]], check=True)\n"
    )
    if arguments[:2] != ["jobs", "launch"]:
        return 2
    return subprocess.run([sys.executable, "-c", script, arguments[-1]], check=False).returncode


def ray_train(folder: Path, arguments: list[str]) -> int:
    """Parse the arguments; run the verb dry, alone."""
    verb = arguments[arguments.index("--") + 1 :]
    if arguments[:1] != ["--workers"] or verb[:1] != ["pretrain"]:
        return 2
    return lalia(folder, ["run", *verb[1:], "--dry-run"])


def installed_environment(folder: Path) -> None:
    """What the Makefile takes for a finished installation, whose lalia is ours."""
    venv = folder / "venv"
    venv.mkdir()
    (venv / "bin").symlink_to(folder / "bin")
    for stamp in (".demo", ".test", ".dev"):
        (venv / stamp).touch()


def stop_server(folder: Path) -> tuple[int, str]:
    """End the server that a block started, as Ctrl-C does; its exit status and what it printed."""
    pid_file, log = folder / "server.pid", (folder / "server.log").read_text(encoding="utf-8")
    os.kill(int(pid_file.read_text()), signal.SIGINT)
    pid_file.unlink()
    deadline = time.monotonic() + SERVER_SECONDS
    while not (folder / "server.exit").exists():
        if time.monotonic() > deadline:
            return -1, log
        time.sleep(0.02)
    return int((folder / "server.exit").read_text()), log


def miniature(arguments: list[str], settings: list[str]) -> list[list[str]]:
    """The commands to run in place of one: for a recipe, a dry run of it as written, then the small version."""
    if arguments[:1] and arguments[0] in RECIPE_VERBS and not {"--help", "--quantize"} & {*arguments}:
        as_written = [a for i, a in enumerate(arguments) if not {a, arguments[i - 1]} & {*PLAN_OPTIONS}]
        dry_run = ["run", *as_written[1:], *([] if "--dry-run" in arguments else ["--dry-run"])]
        if arguments[0] == "plan":  # a budget and fixed steps exclude each other, and devices need rows for each
            settings = [s for s in settings if not s.startswith(("pretrain.steps=", "pretrain.batch_size="))]
        if "--device" in arguments:  # data sheets of devices that are not here have no float32
            settings = [s for s in settings if s != "pretrain.precision=float32"]
        return [dry_run, [*arguments, *settings]]
    return [arguments]


def _serve(folder: Path, arguments: list[str]) -> int:
    port = os.environ["DOCS_PORT"]
    if (folder / "server.pid").exists():
        stop_server(folder)
    (folder / "server.exit").unlink(missing_ok=True)
    with (folder / "server.log").open("wb") as log, open(os.devnull, "rb") as nothing:
        files = (nothing.fileno(), log.fileno(), log.fileno())
        connection = _request(folder, [*arguments, "--port", port], files)
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and not (folder / "server.exit").exists():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                connection.close()
                return 0
        except OSError:
            time.sleep(0.02)
    sys.stderr.write((folder / "server.log").read_text(encoding="utf-8"))
    return 1


def _request(folder: Path, arguments: list[str], files: tuple[int, int, int]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(folder / "commands"))
    message = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    connection.sendmsg([json.dumps(message).encode()], rights)
    connection.shutdown(socket.SHUT_WR)
    return connection


def _which(name: str) -> str:
    import shutil

    found = shutil.which(name, path=os.defpath + ":/usr/local/bin:/opt/homebrew/bin")
    assert found, f"the documentation uses {name}, which this machine lacks"
    return found


def answer_commands(folder: Path) -> None:
    """The process behind the client: imports, then forks for every command. Computes nothing itself."""
    for module in PRELOADED:
        importlib.import_module(module)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "starting"))
    listener.listen(16)
    os.rename(folder / "starting", folder / "commands")  # who sees the name can connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _run(folder, connection, settings)
        connection.close()


def _run(folder: Path, connection: socket.socket, settings: list[str]) -> None:
    content, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while piece := connection.recv(1 << 20):
        content += piece
    message: dict[str, Any] = json.loads(content)
    arguments = message["arguments"]
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"])
    if arguments[:1] == ["chat"] and stat.S_ISCHR(os.fstat(0).st_mode):
        reading, writing = os.pipe()
        os.write(writing, CHAT_LINES)
        os.close(writing)
        os.dup2(reading, 0)
    if arguments[:1] == ["serve"]:
        (folder / "server.pid").write_text(str(os.getpid()))
    if arguments[:1] == ["pull"]:
        _stand_in_for_fetching(folder)
    code = _main(*miniature(arguments, settings))
    if arguments[:1] == ["serve"]:
        (folder / "server.exit.part").write_text(str(code))
        os.rename(folder / "server.exit.part", folder / "server.exit")
    with contextlib.suppress(OSError):  # a server outlives its client
        connection.send(bytes([code]))
    os._exit(code)


def _stand_in_for_fetching(folder: Path) -> None:
    """Whatever `lalia pull` is to fetch, the model that `make demo` made comes."""
    import shutil

    from lalia.formats import hub, pull, store

    def fetch(name: str, target: Path) -> None:
        shutil.copytree(folder / "finished" / "runs" / "shakespeare" / "chat", target, dirs_exist_ok=True)
        facts = store.facts_of_files(target)
        source = store.Source(name.removeprefix("hf:"), name, "a test", name, "apache-2.0", store.today(), facts)
        store.write_card(target, source, "A stand-in.", f"lalia chat {name}")

    pull.fetch_package = lambda name, package, target, progress: fetch(name, target)
    hub.fetch_repository = lambda name, target, progress: fetch(name, target)


def _main(*commands: list[str]) -> int:
    import traceback

    from lalia.cli import main

    output = os.dup(1)
    for number, arguments in enumerate(commands):
        sys.argv = ["lalia", *arguments]
        if number < len(commands) - 1:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        else:
            os.dup2(output, 1)
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
        except BaseException:  # noqa: BLE001 (what the interpreter itself does with an exception nobody catches)
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        if code:
            return code
    return 0


if __name__ == "__main__":
    answer_commands(Path(sys.argv[1]))
