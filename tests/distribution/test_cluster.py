"""Who the workers are, out of TF_CONFIG and out of the variables of a Slurm step."""

import itertools
import json
import os
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_resnet.distribution import cluster as clusters
from keras_resnet.distribution.cluster import Cluster, find_cluster, parse_tf_config, slurm_cluster
from keras_resnet.utils.errors import InputError

TWO = {"worker": ["a:2222", "b:2222"]}


def tf_config(cluster=None, **task):
    task = {"type": "worker", "index": 0, **task}
    return json.dumps({"cluster": TWO if cluster is None else cluster, "task": task})


def check_line(error, *texts):
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    for text in texts:
        assert text in message, message


@pytest.mark.parametrize("text", ["", " \n", "{}", '{"cluster": {}}', '{"task": {"index": 7}}'])
def test_without_a_cluster_it_is_one_machine(text):
    assert parse_tf_config(text) is None


@pytest.mark.parametrize("index", [0, 1])
def test_each_worker_has_its_place(index):
    cluster = parse_tf_config(tf_config(index=index))
    assert cluster == Cluster(("a:2222", "b:2222"), index, "TF_CONFIG")
    assert cluster.is_chief == (index == 0) and cluster.size == 2
    assert cluster.address == cluster.workers[index]
    assert cluster.name(1) == "worker 1 (b:2222)"
    assert json.dumps(cluster.tf_config) == tf_config(index=index)


@pytest.mark.parametrize(
    ("job", "index", "place"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
)
def test_a_chief_is_worker_0(job, index, place):
    jobs = {"worker": ["b:1", "c:1"], "chief": ["a:1"], "ps": []}
    cluster = parse_tf_config(tf_config(jobs, type=job, index=index))
    assert cluster.workers == ("a:1", "b:1", "c:1") and cluster.index == place
    workers = {"cluster": {"worker": ["a:1", "b:1", "c:1"]}}
    assert cluster.tf_config == {**workers, "task": {"type": "worker", "index": place}}


@pytest.mark.parametrize("jobs", [{"worker": ["a:1"]}, {"chief": ["a:1"]}])
def test_one_worker_is_a_cluster_too(jobs):
    assert parse_tf_config(tf_config(jobs, type=next(iter(jobs)))).size == 1


@pytest.mark.parametrize("index", [1, "1", " 1", 1.0, "01"])
def test_the_index_is_read_as_tensorflow_reads_it(index, monkeypatch):
    import tensorflow as tf

    monkeypatch.setenv("TF_CONFIG", tf_config(index=index))
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert find_cluster().index == resolver.task_id == 1


@pytest.mark.parametrize(
    "address",
    ["a:1", "10.0.0.1:65535", "[::1]:80", "[fe80::1%eth0]:80", "a-b.c_d.svc:02222", "a.:1"],
)
def test_addresses_that_are_addresses(address):
    assert parse_tf_config(tf_config({"worker": [address]})).address == address


@pytest.mark.parametrize(
    "address",
    [
        *("a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "a:１", "::1:80", "[::1]", "[x]:80"),
        *("[]:1", "http://a:1", "a b:1", "a..b:1", "ä:1", "a\n:1", "a:1\n", "a" * 64 + ":1"),
        *(".".join(["a" * 60] * 5) + ":1", "\ud800:1", "a:1" + " " * 10**4),
        *(None, 7, ["a:1"], {}),
    ],
)
def test_addresses_that_are_none(address):
    with pytest.raises(InputError, match=r"^TF_CONFIG: address 1 of the job") as error:
        parse_tf_config(tf_config({"worker": ["a:1", address]}))
    check_line(error, "port in 1 … 65535, got ")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "{'cluster': {}}",
            ["must be JSON, got \"{'cluster'", "line 1 column 2 (char 1)"],
        ),
        ("{", ["must be JSON", "line 1 column 2"]),
        ("[" * 10**5, ["must be JSON", "nested too deeply"]),
        ("9" * 5000, ["must be JSON", "4300"]),
        ("\ud800\n", ["must be JSON", "Expecting value"]),
        ("[]", ["must be an object, got []"]),
        ("null", ["must be an object, got None"]),
        ('{"cluster": []}', ['"cluster" must be an object, got []']),
        ('{"cluster": {"worker": []}}', ["there must be a worker"]),
        ('{"cluster": {"worker": "a:1"}}', ["\"worker\" must be a list of addresses, got 'a:1'"]),
        (
            '{"cluster": {"worker": {"0": "a:1"}}}',
            ["a list of addresses, got {'0': 'a:1'}"],
        ),
        ('{"cluster": {"boss": ["a:1"]}}', ["the jobs must be", "got 'boss'; name it so, or"]),
        (tf_config({**TWO, "ps": ["c:1"]}), ["got 'ps'; parameter servers belong to another"]),
        (tf_config({**TWO, "evaluator": ["c:1"]}), ["'evaluator'; the chief evaluates itself"]),
        (tf_config({"chief": ["a:1", "b:1"]}), ["one chief, got ('a:1', 'b:1')"]),
        (tf_config({"worker": ["a:1", "b:1", "A:01"]}), ["same for workers 0 and 2, A:01"]),
        (tf_config({"chief": ["a:1"], "worker": ["a:1"]}), ["same for workers 0 and 1, a:1"]),
        (json.dumps({"cluster": TWO}), ['"task" must be an object', "got None"]),
        (json.dumps({"cluster": TWO, "task": 1}), ['"task" must be an object', "got 1"]),
        (json.dumps({"cluster": TWO, "task": {"index": 0}}), ['"type" must be', "got None"]),
        (json.dumps({"cluster": TWO, "task": {"type": "worker"}}), ['"index" must be', "got None"]),
        (tf_config(type="ps"), ["got 'ps'; parameter servers"]),
        (tf_config(type="evaluator"), ["got 'evaluator'; the chief evaluates itself"]),
        (tf_config(type="boss"), ["got 'boss'; say which of them"]),
        (tf_config(type=["worker"]), ["got ['worker']"]),
        (tf_config(type="chief"), ['the task is a chief, and "cluster" has none']),
        (tf_config(index=2), ["the index must be in 0 … 1, since there are 2 workers, got 2; "]),
        (tf_config(index=-1), ["the index must be in 0 … 1, since there are 2 workers, got -1; "]),
        (tf_config({"chief": ["a:1"]}, type="chief", index=1), ["0 … 0, since there is 1 chief"]),
        *((tf_config(index=index), ["must be a whole number, got"]) for index in (1.5, "x", "-1")),
        *((tf_config(index=index), ["must be a whole number, got"]) for index in (None, True, [])),
        (tf_config(index=float("inf")), ["must be a whole number, got inf"]),
        (tf_config(index="1" * 5000), ["must be a whole number, got '111"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, parts):
    with pytest.raises(InputError, match=r"^TF_CONFIG: ") as error:
        parse_tf_config(text)
    check_line(error, *parts)


values = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        st.sampled_from(["worker", "chief", "ps", "a:1", "b:2", "[::1]:3", "0", "1"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["cluster", "task", "worker", "chief", "type", "index", "x"]), inner
        ),
    ),
)
addresses = st.sampled_from(["a:1", "b:2", "[::1]:3", "c", "a:01"])
jobs = st.dictionaries(
    st.sampled_from(["chief", "worker", "ps"]), st.lists(addresses, max_size=3) | values
)
tasks = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["chief", "worker"]) | values, "index": values}
)
configs = st.fixed_dictionaries({}, optional={"cluster": jobs | values, "task": tasks | values})


@settings(max_examples=400, deadline=None)
@given(configs | values)
@example({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 10**400}})
def test_any_json_gives_a_cluster_none_or_one_line(value):
    check_any(json.dumps(value))


@given(st.text())
def test_any_text_gives_a_cluster_none_or_one_line(text):
    check_any(text)


def check_any(text):
    try:
        cluster = parse_tf_config(text)
    except InputError as error:
        assert str(error).startswith("TF_CONFIG: ") and str(error).isprintable()
    else:
        assert cluster is None or cluster.address == cluster.workers[cluster.index]


def step(nodes="n[1-2]", tasks="2,1", total=3, index=0, **more):
    """Returns the variables that srun sets, as far as they are asked for."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(index),
        "SLURM_STEP_NUM_TASKS": str(total),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        **more,
    }


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_a_step_of_slurm():
    cluster = slurm_cluster(step(index=2))
    hosts, ports = zip(*map(clusters.split_address, cluster.workers), strict=True)
    assert hosts == ("n1", "n1", "n2")
    assert ports == (ports[0], ports[0] + 1, ports[0])
    assert (cluster.index, cluster.source) == (2, "Slurm")
    assert parse_tf_config(json.dumps(cluster.tf_config)).workers == cluster.workers


def test_jobs_and_steps_have_ports_of_their_own():
    def first_port(job, number=0):
        environ = step(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number))
        return clusters.split_address(slurm_cluster(environ).workers[0])[1]

    jobs = sorted(first_port(job) for job in range(4700, 4800))
    assert jobs[0] >= 12000 and jobs[-1] < 32000
    # As many tasks as fit on a node of any make.
    assert min(b - a for a, b in itertools.pairwise(jobs)) > 128
    assert abs(first_port(4711, 0) - first_port(4711, 1)) > 128


# The shell of an sbatch script of four nodes, as far as it bears on this; there is no step.
BATCH = {
    "SLURM_JOB_ID": "200505",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_JOB_NODELIST": "gnode[10,20,25,37]",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,
        step("n1", "1", 1),
        without(step(), "SLURM_PROCID"),
        without(step(), "SLURM_STEP_ID"),
        without(step(), "SLURM_STEP_NUM_TASKS"),
        # An interactive step of one task within an allocation for four.
        {**BATCH, **step("gnode10", "1", 1)},
    ],
)
def test_no_step_of_several_tasks(environ):
    assert slurm_cluster(environ) is None


def test_an_old_slurm_says_the_number_of_tasks_otherwise():
    environ = without(step(SLURM_NTASKS="3"), "SLURM_STEP_NUM_TASKS")
    assert slurm_cluster(environ) == slurm_cluster(step())


def test_tf_config_comes_first():
    environ = step(TF_CONFIG=tf_config(index=1))
    assert find_cluster(environ).source == "TF_CONFIG"
    assert find_cluster(step(TF_CONFIG="{}")) is None
    assert find_cluster(step(TF_CONFIG=" ")).source == "Slurm"
    assert find_cluster(step()).source == "Slurm"


def test_the_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(index=1))
    assert find_cluster().index == 1


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("n1,n0", ["n1", "n0"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[07,09-10],x-[1]", ["n07", "n09", "n10", "x-1"]),
        ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
        ("n[1-2].lan", ["n1.lan", "n2.lan"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_nodes_stay_in_the_order_of_slurm(nodes, expected):
    count = len(expected)
    cluster = slurm_cluster(step(nodes, f"1(x{count})", count))
    assert [clusters.split_address(worker)[0] for worker in cluster.workers] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("SLURM_PROCID", value) for value in ("x", "", "-1", "3", "1" * 99)),
        *(("SLURM_STEP_NUM_TASKS", value) for value in ("two", "4", "2.0")),
        *(("SLURM_JOB_ID", value) for value in (None, "x", "1\n")),
        ("SLURM_STEP_ID", "batch"),
        *(("SLURM_STEP_NODELIST", value) for value in (None, "", "n1,", "n[1-2", "n1]", "n[2-1]")),
        *(("SLURM_STEP_NODELIST", value) for value in ("n[a-b],c", "n[],c", "n1,n1", "n 1,n2")),
        *(("SLURM_STEP_NODELIST", value) for value in ("n[1-999999999]", "n[0-999]x[0-999]")),
        *(("SLURM_STEP_TASKS_PER_NODE", value) for value in (None, "", "3", "1(x3)", "x", "2,1,")),
        *(("SLURM_STEP_TASKS_PER_NODE", value) for value in ("2,(x1)", "1(x999999999)", "99999,1")),
        ("SLURM_LOCALID", "?"),
    ],
)
def test_malformed_variables_are_named(name, value):
    environ = step(SLURM_NODEID="0", SLURM_LOCALID="0")
    environ = without(environ, name) if value is None else {**environ, name: value}
    with pytest.raises(InputError, match=r"^SLURM_\w+ must be ") as error:
        slurm_cluster(environ)
    got = "it is not set" if value is None else f"got {value!r:.30}"
    check_line(error, name, got, "; start the program with srun, or set TF_CONFIG")


def test_tasks_that_go_round_the_nodes_are_refused():
    block = [("0", "0"), ("0", "1"), ("1", "0")]
    for index, (node, local) in enumerate(block):
        environ = step(index=index, SLURM_NODEID=node, SLURM_LOCALID=local)
        assert slurm_cluster(environ).index == index
    with pytest.raises(InputError, match=r"got 1 for task 0 of node 1; start .*=block") as error:
        slurm_cluster(step(index=1, SLURM_NODEID="1", SLURM_LOCALID="0"))
    check_line(error)


@st.composite
def steps(draw):
    """Draws the variables of a step whose nodes' names are in the same order as strings."""
    nodes, hosts = [], 0
    for letter in draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=4).map(sorted)):
        numbers = draw(st.lists(st.integers(0, 999), unique=True, max_size=4).map(sorted))
        ranges = [f"{number:03}" for number in numbers]
        if numbers and draw(st.booleans()):
            ranges[-1] += f"-{min(numbers[-1] + draw(st.integers(0, 9)), 999):03}"
        nodes.append(f"{letter}[{','.join(ranges)}]" if ranges else letter)
        first, _, last = (ranges or ["1"])[-1].partition("-")
        hosts += max(1, len(ranges)) + int(last or first) - int(first)
    tasks = draw(st.lists(st.integers(1, 4), min_size=hosts, max_size=hosts))
    total = sum(tasks)
    runs = ",".join(str(count) for count in tasks)
    if len(set(tasks)) == 1:
        runs = f"{tasks[0]}(x{hosts})"
    index = draw(st.integers(0, max(0, total - 1)))
    return step(",".join(nodes), runs, total, index)


@settings(max_examples=200, deadline=None)
@given(environ=steps())
def test_the_workers_are_those_of_tensorflows_resolver(environ):
    import tensorflow as tf

    cluster = slurm_cluster(environ)
    if int(environ["SLURM_STEP_NUM_TASKS"]) < 2:
        assert cluster is None
        return
    first = clusters.split_address(cluster.workers[0])[1]
    # The resolver reads `os.environ` and nothing else.
    with mock.patch.dict(os.environ, environ):
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=first, gpus_per_node=64, gpus_per_task=1, auto_set_gpu=False
        )
        theirs = resolver.cluster_spec().as_dict()
    assert theirs == cluster.tf_config["cluster"]
    assert resolver.get_task_info() == ("worker", cluster.index)
