"""launchers/: each file, unchanged, starts real trainings on two workers."""

import contextlib
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY_COMMAND

from keras_resnet.distribution.cluster import parse_tf_config, split_address
from keras_resnet.evaluation.report import read_history

pytestmark = pytest.mark.thorough

LAUNCHERS = Path(__file__).parents[2] / "launchers"
SBATCH = LAUNCHERS / "slurm.sbatch"

# The nodes of a job: scontrol expands Slurm's lists.
SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames node[7,9]" ]] && printf '%s\n' node7 node9
[[ $* == "show hostnames here" ]] && echo localhost
"""

# A step of two tasks on this machine, with the variables that Slurm 22.05 gives its tasks.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2
SLURM_PROCID=0 "$@" &
SLURM_PROCID=1 "$@" &
wait -n; first=$?
wait -n; second=$?
exit $((first > second ? first : second))
"""

# A step that ends with the next of the statuses that stand in a file.
STATUSES = """#!/usr/bin/env bash
printf '%s ' "${@//$'\n'/; }"
echo
status=$(head -n 1 "$LEFT")
sed -i 1d "$LEFT"
exit "$status"
"""


@pytest.fixture
def programs(tmp_path):
    """Returns a function that puts a script into a folder on PATH, and the environment for it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    environ = {
        # The variables of a surrounding job do not count here.
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

    def put(name, text):
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
        return environ

    return put


@pytest.fixture
def environ(programs):
    """An environment in which `keras-resnet` knows the network "tiny"."""
    words = shlex.join([sys.executable, "-c", TINY_COMMAND])
    return programs("keras-resnet", f'#!/usr/bin/env bash\nexec {words} "$@"\n')


def words(folder, run_dir):
    return [
        *("--model", "tiny", "--dataset", f"folder:{folder}", "--run-dir", str(run_dir)),
        *("--recipe", "quick"),
        *("--image-size", "28", "--batch-size", "32", "--epochs", "1", "--precision", "float32"),
    ]


SCALED = ("--scale-batch", "--sync-batchnorm")


def are_free(ports):
    with contextlib.ExitStack() as stack:
        try:
            for port in ports:
                stack.enter_context(socket.create_server(("", port)))
        except OSError:
            return False
    return True


def check_run(run_dir, stdout, chief):
    assert f"strategy: multiworker ({chief}" in stdout and "2 replicas" in stdout
    assert len(read_history(run_dir / "history.csv")) == 1
    assert (run_dir / "report.md").is_file() and (run_dir / "model.keras").is_file()


def ports(job):
    """Returns the ports that the workers of a job of `SRUN` will have."""
    first = 12000 + job * 12361 % 20000
    return [first, first + 1]


@pytest.mark.slow
def test_sbatch_trains(programs, environ, fashion_folder, tmp_path):
    """The script runs whole; only `srun` and `scontrol` are replaced, for CI has no Slurm."""
    programs("srun", SRUN)
    programs("scontrol", SCONTROL)
    job = next(job for job in itertools.count(os.getpid()) if are_free(ports(job)))
    run_dir = tmp_path / "run"
    done = subprocess.run(
        ["bash", str(SBATCH), *words(fashion_folder, run_dir), *SCALED],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **environ,
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "here",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    check_run(run_dir, done.stdout, "TF_CONFIG, worker 0 (localhost:")
    # Batch size and rate are those of two replicas.
    recipe = json.loads((run_dir / "config.json").read_text())["recipe"]
    assert (recipe["batch_size"], recipe["learning_rate"]) == (64, 4e-3)


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [
        *(([0], 0, 1), ([1], 1, 1), ([2], 2, 1), ([137, 75, 0], 0, 3), ([75] * 4, 75, 3)),
        ([143, 2], 2, 2),
    ],
)
def test_sbatch_starts_again(programs, tmp_path, statuses, status, starts):
    left = tmp_path / "left"
    left.write_text("".join(f"{each}\n" for each in statuses))
    done = subprocess.run(
        ["bash", str(SBATCH), "--epochs", "3", "--dataset", "folder:a b"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**programs("srun", STATUSES), "LEFT": str(left), "SLURM_JOB_ID": "7", "RESTARTS": "2"},
    )
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (status, starts), done.stderr
    assert len(set(lines)) == 1
    assert "--resume auto --run-dir runs/slurm-7 --epochs 3 --dataset folder:a b" in lines[0]
    assert done.stderr.count("restart ") == starts - 1


# Prints the TF_CONFIG of each of four tasks.
SHOW = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for SLURM_PROCID in 0 1 2 3; do
    SLURM_PROCID=$SLURM_PROCID bash "${@:2:3}" printenv TF_CONFIG
done
"""


def test_sbatch_names_the_workers_node_by_node(programs):
    programs("scontrol", SCONTROL)

    def find(job):
        environ = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[7,9]"}
        done = subprocess.run(
            ["bash", str(SBATCH)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**programs("srun", SHOW), **environ, "SLURM_NTASKS_PER_NODE": "2"},
        )
        assert done.returncode == 0, done.stderr
        clusters = [parse_tf_config(line) for line in done.stdout.splitlines()]
        assert [cluster.index for cluster in clusters] == [0, 1, 2, 3]
        [workers] = {cluster.workers for cluster in clusters}
        hosts, ports = zip(*map(split_address, workers), strict=True)
        assert hosts == ("node7", "node7", "node9", "node9")
        assert ports == (ports[0], ports[0] + 1) * 2
        return ports[0]

    # Jobs that run at the same time have different ports.
    first_ports = sorted(map(find, range(4700, 4706)))
    assert first_ports[0] >= 12000 and first_ports[-1] < 32000
    assert min(b - a for a, b in itertools.pairwise(first_ports)) > 128


@pytest.fixture(scope="module")
def objects():
    """The objects of kubernetes.yaml, by kind."""
    documents = yaml.safe_load_all((LAUNCHERS / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_kubernetes_objects_fit_together(objects):
    service, claim, job = (objects[kind] for kind in ("Service", "PersistentVolumeClaim", "Job"))
    template = job["spec"]["template"]
    pod = template["spec"]
    [container] = pod["containers"]
    values = {each["name"]: each.get("value") for each in container["env"]}
    [port] = container["ports"]
    # Kubernetes calls the pods of an indexed job JOB-INDEX, in the domain of the headless service.
    name = f"{job['metadata']['name']}-%g.{service['metadata']['name']}"
    assert values["ADDRESS"] == f"{name}:{port['containerPort']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(values["WORKERS"])
    [volume] = pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert [volume["name"]] == [mount["name"] for mount in container["volumeMounts"]]


def start_pods(container, count, more, environ):
    """Starts a container's command as `count` pods of an indexed job would, on this machine."""
    tens = next(tens for tens in range(2000, 3200) if are_free([10 * tens, 10 * tens + 1]))
    own = {"WORKERS": str(count), "ADDRESS": f"localhost:{tens}%g", "TF_NUM_INTRAOP_THREADS": "1"}
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    return [
        subprocess.Popen(
            [*container["command"], *container["args"], *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environ, **given, **own, "JOB_COMPLETION_INDEX": str(index)},
        )
        for index in range(count)
    ]


@pytest.mark.slow
def test_kubernetes_command_trains(objects, environ, fashion_folder, tmp_path):
    [container] = objects["Job"]["spec"]["template"]["spec"]["containers"]
    run_dir = tmp_path / "run"
    # The last of two values counts: the file's own --run-dir is not of this machine.
    pods = start_pods(container, 2, words(fashion_folder, run_dir), environ)
    try:
        outputs = [pod.communicate(timeout=300) for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    check_run(run_dir, outputs[0][0], "TF_CONFIG, worker 0 (localhost:")


@pytest.mark.slow
def test_ray_train_trains(fashion_folder, tmp_path):
    """Ray's own cluster on this machine, with two processors at least."""
    pytest.importorskip("ray.train.tensorflow")
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, str(LAUNCHERS / "ray_train.py"), "--run-dir", str(run_dir)),
            *("model=resnet18", f"dataset=folder:{fashion_folder}", "image_size=28"),
            *("batch_size=32", "epochs=1", "precision=float32"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_run(run_dir, done.stdout + done.stderr, "TF_CONFIG, worker 0 (")
    assert "last epoch: {'epoch': 1" in done.stdout
    folder = done.stdout.split("model: ")[1].splitlines()[0]
    assert Path(folder).is_file()
