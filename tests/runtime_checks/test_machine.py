"""Reading the processor, and saying what it means."""

import pytest

from mecdeploy.runtime_checks import checks, machine
from mecdeploy.runtime_checks.machine import describe_cpu

EPYC = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 fma {}\n\nprocessor\t: 1\nmodel name\t: other\n"


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni"])
def test_vnni_is_a_flag(flag):
    cpu = describe_cpu(EPYC.format(flag), "x86_64")
    assert (cpu.model, cpu.architecture, cpu.vnni, cpu.note) == ("AMD EPYC", "x86_64", True, "")


def test_no_vnni_is_said():
    cpu = describe_cpu(EPYC.format("avx512_vnni_not_quite"), "AMD64")
    assert cpu.vnni is False
    assert "no VNNI" in cpu.note
    assert checks._processor_hints(cpu, ("stem", "fc"))[0].endswith("Units at risk: stem, fc.")


def test_arm_is_said():
    cpu = describe_cpu("CPU implementer : 0x41\nFeatures : asimd asimddp\n", "aarch64")
    assert cpu.vnni is None
    assert "fixed point on aarch64" in cpu.note
    assert checks._processor_hints(cpu, ()) == [cpu.note]


def test_unreadable_cpuinfo_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "absent")
    cpu = describe_cpu(architecture="x86_64")
    assert (cpu.vnni, cpu.note) == (None, "")
    assert cpu.model
    assert checks._processor_hints(cpu, ("stem",)) == []


def test_this_machine():
    cpu = describe_cpu()
    assert cpu.architecture and cpu.model
    assert set(machine.versions()) == {"onnxruntime", "onnx", "numpy", "python"}
