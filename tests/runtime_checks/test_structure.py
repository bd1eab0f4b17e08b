"""What the optimised graph and the initialisers' bytes say, and that looking does not change what runs."""

import json
from collections import Counter

import numpy as np
import pytest
from onnx import TensorProto, helper
from qdq_models import Builder, images, initializer, replace, residual_network, to_logits, value_of
from qdq_storage import STORAGES, STORED_BITS
from qdq_units import mobile_network

from mecdeploy.runtime_checks import CheckError, inspect_structure, read_model
from mecdeploy.runtime_checks.op_types import INTEGER_PRODUCTS
from mecdeploy.runtime_checks.runtime import Runtime, expose, optimized_graph

PACKED = ("narrow", "block.conv1", "block.conv2", "depthwise", "grouped", "hidden")
PLAIN = ("stem", "short", "classifier")


def inspect(model):
    return inspect_structure(model.SerializeToString())


def set_metadata(model, key, value):
    (prop,) = [prop for prop in model.metadata_props if prop.key == f"mecdeploy.{key}"]
    prop.value = json.dumps(value)


@pytest.mark.parametrize("storage", STORAGES)
def test_packed_bits_are_measured(storage):
    report = inspect(residual_network(storage=storage))
    bits = STORED_BITS[storage]
    assert report.failures == ()
    assert report.packed_bits == {**dict.fromkeys(PACKED, bits), **dict.fromkeys(PLAIN, 8)}
    (row,) = [row for row in report.weights if row.unit == "block.conv1"]
    assert (row.weights, row.storage) == (12 * 12 * 9, "table" if "table" in storage else storage)
    per_weight = {"int8": 8, "int4": 4, "int2": 2, "table2": 2, "table3": 16 * 260 / 1296, "table4": 4}[storage]
    assert row.bits_per_weight == pytest.approx(per_weight, abs=1e-12)  # a ratio of small integers


def test_every_product_is_an_integer_kernel():
    report = inspect(residual_network())
    assert sorted(report.integer_products) == sorted(PACKED + PLAIN)
    assert report.float_products == ()
    assert (report.kernels["QLinearConv"], report.kernels["QGemm"], report.kernels["QLinearAdd"]) == (7, 2, 3)


def test_exposing_units_leaves_the_kernels_and_the_logits_alone():
    model = residual_network()
    file = read_model(model.SerializeToString())
    exposed = read_model(model.SerializeToString())
    exposed.proto.CopyFrom(expose(file, file.units))
    optimized = [optimized_graph(item.proto.SerializeToString(), item.label) for item in (file, exposed)]
    kinds = [Counter(node.op_type for node in graph.node) for graph in optimized]
    for kind in (
        *INTEGER_PRODUCTS,
        "QLinearAdd",
        "QLinearGlobalAveragePool",
        "Clip",
        "QuantizeLinear",
        "DequantizeLinear",
    ):
        assert kinds[0][kind] == kinds[1][kind], kind
    pixels = images(0, 40)
    assert np.array_equal(Runtime(file).run(pixels)["logits"], Runtime(file, exposed=file.units).run(pixels)["logits"])
    assert [value.name for value in file.proto.graph.output] == ["logits"]


@pytest.mark.parametrize("unit", ["block.conv1", "hidden"])
@pytest.mark.parametrize("factor", [1 + 2.0**-22, 0.5])
def test_a_bias_scale_that_does_not_fit_is_named(unit, factor):
    """Whether onnxruntime fuses all the same depends on its version and on the op."""
    model = residual_network()
    scale = value_of(model, f"{unit}/bias/scale")
    scale[3] *= np.float32(factor)
    replace(model, f"{unit}/bias/scale", scale)
    assert inspect(model).failures[-1].startswith(f"{unit}: the bias scale is not input scale times weight scale")


def test_packed_weights_that_onnxruntime_does_not_unpack_are_float():
    """INT4 straight into DequantizeLinear: valid ONNX, and a float convolution."""
    model = residual_network(storage="int4")
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.name == "block.conv1/weight":
            model.graph.node.remove(node)
    for node in model.graph.node:
        if node.name == "block.conv1/weight/real":
            node.input[0] = "block.conv1/weight/packed"
            node.input[2] = "block.conv1/weight/zero4"
    model.graph.initializer.append(
        helper.make_tensor("block.conv1/weight/zero4", TensorProto.INT4, [12], bytes(6), raw=True)
    )
    report = inspect(model)
    assert report.float_products == ("block.conv1",)
    assert report.failures[0].startswith(
        "onnxruntime runs 8 of 9 convolutions and Gemms in integers; in float: block.conv1."
    )


def test_a_float_clip_is_refused():
    """The textbook way to write a ReLU6 or a low-bit range costs the integer kernel; the export never writes it."""
    build = Builder(np.random.default_rng(0))
    x = build.pixels((3, 6, 6))
    model = to_logits(build, x, build.conv("conv", x, 8, bits=8, signed=True))
    position = next(i for i, node in enumerate(model.graph.node) if node.name == "conv")
    for name, value in (("low", -0.5), ("high", 0.5)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    model.graph.node[position].input[0] = "clipped"
    model.graph.node.insert(
        position, helper.make_node("Clip", ["conv/float", "low", "high"], ["clipped"], name="clipped")
    )
    with pytest.raises(CheckError, match="conv/float' \\(Conv\\): its float output is read by Clip"):
        inspect(model)


def test_metadata_is_only_compared_with():
    model = residual_network(storage="table3")
    promised = dict.fromkeys(PACKED, 3) | dict.fromkeys(PLAIN, 8) | {"narrow": 2, "ghost": 4}
    del promised["stem"]
    set_metadata(model, "weight_bits", promised)
    report = inspect(model)
    assert report.packed_bits["narrow"] == 3
    assert [failure.split(". ")[0] for failure in report.failures] == [
        "stem: the weights are stored at 8 bits, the metadata promises nothing",
        "narrow: the weights are stored at 3 bits, the metadata promises 2 bits",
        "ghost: the metadata names this unit, but the graph has no weights for it",
    ]


def test_weights_stored_as_varints_are_not_packed():
    model = residual_network(storage="int8")
    codes = value_of(model, "narrow/weight")
    tensor = initializer(model, "narrow/weight")
    tensor.CopyFrom(helper.make_tensor("narrow/weight", TensorProto.INT8, codes.shape, codes.reshape(-1).tolist()))
    (failure,) = inspect(model).failures
    assert failure.startswith(f"narrow: {codes.size} weights take ")
    assert f"where {codes.size} hold them at 8 bits" in failure


def test_units_at_risk_of_int16_saturation():
    """2 * max code * max |weight| > 32767: 255 and 64 are safe, 255 and 65 are not, 15 and 127 are."""
    model = residual_network(storage="int8", act_bits=4)
    largest = {"stem": 64, "block.conv1": 127, "short": 65}
    for unit, value in largest.items():
        codes = np.clip(value_of(model, f"{unit}/weight"), -value, value)
        codes.reshape(-1)[0] = -value
        replace(model, f"{unit}/weight", codes)
    assert inspect(model).saturation_risk == ("short",)


def test_a_listed_tensor_nobody_writes():
    model = residual_network()
    file = read_model(model.SerializeToString())
    set_metadata(model, "units", [*file.units, "ghost/act"])
    failure = inspect(model).failures[0]
    assert failure.startswith("ghost/act: the metadata lists this tensor, but no node writes it.")


def test_activation_bits_are_measured_too():
    """Through a pool and a flatten, which keep the codes they are given."""
    model = residual_network(act_bits=4)
    promised = json.loads(next(prop.value for prop in model.metadata_props if prop.key == "mecdeploy.activation_bits"))
    assert (promised["narrow"], promised["stem"], promised["pool"]) == (4, 8, 8)
    replace(model, "narrow/qmax", np.array(7))
    del promised["flat"]
    set_metadata(model, "activation_bits", promised)
    assert [failure.split(". ")[0] for failure in inspect(model).failures] == [
        "narrow: the integers are held at 3 bits, the metadata promises 4 bits",
        "flat: the integers are held at 8 bits, the metadata promises nothing",
    ]


def test_what_stays_float_is_counted_where_no_island_is_either():
    """An activation without an integer kernel between DequantizeLinear and QuantizeLinear: no failure, but told."""
    model = residual_network()
    assert inspect(model).float_operators == {}
    for node in model.graph.node:
        if node.name == "join/float":
            node.op_type = "Div"  # not what was trained: only what is counted matters here
    report = inspect(model)
    assert report.float_operators == {"Div": 1}
    assert report.islands == ()


def test_bits_are_measured_through_every_movement():
    """Slices, transposes and reshapes hold what they are given; a Concat what its widest input holds."""
    model = mobile_network()
    assert inspect(model).failures == ()
    promised = json.loads(next(prop.value for prop in model.metadata_props if prop.key == "mecdeploy.activation_bits"))
    names = ("dense", "pairs", "turned", "shuffled", "low", "high")
    assert {promised[name] for name in names} == {8}
    replace_in = {name: 4 for name in names}
    set_metadata(model, "activation_bits", promised | replace_in)
    assert [failure.split(":")[0] for failure in inspect(model).failures] == list(names)
