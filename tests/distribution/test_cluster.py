"""The workers of a run, read from TF_CONFIG."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_resnet.distribution.cluster import Cluster, find_cluster, parse_tf_config
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
    assert cluster == Cluster(("a:2222", "b:2222"), index)
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
        ('{"cluster": {"boss": ["a:1"]}}', ["the jobs must be", "got 'boss'; rename or remove it"]),
        (tf_config({**TWO, "ps": ["c:1"]}), ["got 'ps'; parameter servers belong to another"]),
        (tf_config({**TWO, "evaluator": ["c:1"]}), ["'evaluator'; the chief evaluates itself"]),
        (tf_config({"chief": ["a:1", "b:1"]}), ["one chief, got ['a:1', 'b:1']"]),
        (
            tf_config({"worker": ["a:1", "b:1", "A:01"]}),
            ["workers 0 and 2 must have different addresses, got 'A:01'"],
        ),
        (
            tf_config({"chief": ["a:1"], "worker": ["a:1"]}),
            ["workers 0 and 1 must have different addresses, got 'a:1'"],
        ),
        (json.dumps({"cluster": TWO}), ['"task" must be an object', "got None"]),
        (json.dumps({"cluster": TWO, "task": 1}), ['"task" must be an object', "got 1"]),
        (json.dumps({"cluster": TWO, "task": {"index": 0}}), ['"type" must be', "got None"]),
        (json.dumps({"cluster": TWO, "task": {"type": "worker"}}), ['"index" must be', "got None"]),
        (tf_config(type="ps"), ["got 'ps'; parameter servers"]),
        (tf_config(type="evaluator"), ["got 'evaluator'; the chief evaluates itself"]),
        (tf_config(type="boss"), ["got 'boss'; write the job of this process"]),
        (tf_config(type=["worker"]), ["got ['worker']"]),
        (tf_config(type="chief"), ['the task is a chief, but "cluster" has none']),
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


# The variables of task 1 of a Slurm step of four tasks, and those of the shell of an sbatch script.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
}
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize("environ", [STEP, without(STEP, "SLURM_STEP_NUM_TASKS")])
def test_tasks_of_a_slurm_step_without_tf_config_are_refused(environ):
    with pytest.raises(InputError, match="each of 4 tasks of a Slurm step needs a TF_CONFIG") as e:
        find_cluster(environ)
    check_line(e, "start them with launchers/slurm.sbatch, or set TF_CONFIG={}")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # a single task within a larger allocation
        without(STEP, "SLURM_PROCID"),
        without(STEP, "SLURM_STEP_ID"),
        {**STEP, "TF_CONFIG": "{}"},
    ],
)
def test_other_processes_of_slurm_train_alone(environ):
    assert find_cluster(environ) is None


def test_tf_config_is_read_in_a_slurm_step():
    assert find_cluster({**STEP, "TF_CONFIG": tf_config(index=1)}).index == 1


def test_the_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(index=1))
    assert find_cluster().index == 1
