"""
What TensorFlow itself does with its checkpoints; needs TensorFlow, not groundup.

    make FOLDER          write the golden checkpoints: openai-tiny (as OpenAI's train.py saves) and openai-tiny-sharded
    training PREFIX      the same after a step of Adam, with the optimizer's slots and the step, as fine-tuners have it
    many PREFIX          more names than one block of the index holds
    dump PREFIX          print name, data type, shape and SHA-256 of the bytes of each tensor, as JSON

The golden files in this folder were made by TensorFlow 2.21.0 (tensorflow-cpu, Python 3.11, Linux x86-64):

    python tests/golden/make_openai_tiny.py make tests/golden
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HPARAMS = {"n_vocab": 11, "n_ctx": 5, "n_embd": 4, "n_head": 2, "n_layer": 2}
MANY = 3000


def shapes():
    """The variables of https://github.com/openai/gpt-2/blob/master/src/model.py in the order in which it makes them."""
    width, found = HPARAMS["n_embd"], {}
    found["model/wpe"] = (HPARAMS["n_ctx"], width)
    found["model/wte"] = (HPARAMS["n_vocab"], width)
    for layer in range(HPARAMS["n_layer"]):
        block = {"ln_1/g": (width,), "ln_1/b": (width,), "ln_2/g": (width,), "ln_2/b": (width,)}
        for name, inputs, outputs in (
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            block |= {f"{name}/w": (1, inputs, outputs), f"{name}/b": (outputs,)}
        found |= {f"model/h{layer}/{name}": shape for name, shape in block.items()}
    return found | {"model/ln_f/g": (width,), "model/ln_f/b": (width,)}


def weights():
    """Values that a test can draw again: RandomState's stream never changes (NEP 19)."""
    draw = np.random.RandomState(2019)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()}


def graph(tf, devices):
    """The variables in a graph, spread over devices in turn."""
    variables = []
    for number, (name, value) in enumerate(weights().items()):
        with tf.device(devices[number % len(devices)]):
            variables.append(tf.compat.v1.get_variable(name, initializer=value))
    return variables


def save(tf, prefix, sharded=False, train=False):
    """Save what OpenAI's code has in a session."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = graph(tf, ["/cpu:0", "/cpu:1"] if sharded else ["/cpu:0"])
        step = tf.compat.v1.train.get_or_create_global_step() if train else None
        loss = tf.add_n([tf.reduce_sum(variable**2) for variable in variables])
        update = tf.compat.v1.train.AdamOptimizer(0.0).minimize(loss, step) if train else tf.no_op()
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(update)
        saver = tf.compat.v1.train.Saver(sharded=sharded, save_relative_paths=True)
        saver.save(session, str(prefix), write_meta_graph=False)


def make(tf, folder):
    for name, sharded in (("openai-tiny", False), ("openai-tiny-sharded", True)):
        save(tf, folder / name / "model.ckpt", sharded)
        (folder / name / "hparams.json").write_text(json.dumps(HPARAMS), encoding="utf-8")


def many(tf, prefix):
    names = [f"{'long' * 30}/{number:04d}/{'name' * (number % 30)}" for number in range(MANY)]
    values = [tf.constant([number, -number], tf.int64) for number in range(MANY)]
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * MANY, tensors=values)


def dump(tf, prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    found = {}
    for name, shape in reader.get_variable_to_shape_map().items():
        content = np.ascontiguousarray(reader.get_tensor(name)).tobytes()
        dtype = reader.get_variable_to_dtype_map()[name].name
        found[name] = [dtype, shape, hashlib.sha256(content).hexdigest()]
    print(json.dumps(found, sort_keys=True))


def main(verb, place):
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    if verb == "training":
        save(tf, place, train=True)
    else:
        {"make": make, "many": many, "dump": dump}[verb](tf, place)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
