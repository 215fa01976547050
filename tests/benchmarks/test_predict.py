"""The arithmetic of a predicted step, by hand."""

import pytest

from jaxalign.benchmarks import scaling
from jaxalign.benchmarks.predict import predict, seconds
from jaxalign.training.chips import CHIPS, Chip

CHIP = Chip("toy", "toy", flops=100.0, memory=50.0, memory_rate=10.0, link_rate=8.0, domain=4, far_rate=1.0)


def found(**changes):
    gather = dict(kind="all-gather", axes=("fsdp",), size=64, group=(0, 1, 2, 3), times=2, wire=96.0)
    memory = dict(arguments=20, results=25, results_in_place=20, temporary=10)
    base = dict(devices=4, mesh=dict(data=1, fsdp=4), batch_size=4, tokens=6, device_flops=900, communication=[gather])
    return base | dict(memory=memory, flops=dict(step=3600, model=3000)) | changes


def test_a_step_lies_between_hidden_and_exposed_communication():
    p = predict(found(), CHIP, efficiency=0.5)
    assert (p.compute, p.memory, p.communication) == (18.0, 6.5, 2 * 48 / 8)
    assert (p.overlapped, p.exposed, p.fits) == (18.0, 30.0, True)
    assert not predict(found(memory=dict(arguments=20, results=45, results_in_place=20, temporary=10)), CHIP).fits
    assert predict(found(device_flops=1), CHIP).overlapped == 12.0  # nothing to hide behind
    row = scaling.numbers(found(), CHIP, 0.5)
    assert (row["exposed_s"], row["clips_per_second"], row["mfu"]) == (30.0, 4 / 30, 3000 / 4 / 30 / 100)
    assert (row["mesh"], row["sent_fsdp_gb"], row["shared"]) == ("fsdp 4", 96e-9, 4.0)


def test_links_and_networks():
    inside, two = (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7)
    assert seconds("all-gather", 80, inside, CHIP) == 80 * 3 / 4 / 8
    assert seconds("all-reduce", 80, inside, CHIP) == 2 * 80 * 3 / 4 / 8
    # Half of the bytes are in the other domain; each of four devices fetches a quarter of them.
    assert seconds("reduce-scatter", 80, two, CHIP) == 80 / 2 / 4 / 1.0
    assert seconds("all-reduce", 80, (0, 4), CHIP) == 2 * 80 / 2 / 1.0  # nobody shares
    assert seconds("all-to-all", 80, two, CHIP) == 80 * 4 / 8 / 1.0
    assert seconds("collective-permute", 80, (0, 1), CHIP) == 10.0
    assert seconds("collective-permute", 80, (3, 4), CHIP) == 80.0
    with pytest.raises(ValueError, match="512 devices are more than one domain of v6e"):
        seconds("all-gather", 1, tuple(range(512)), CHIPS["v6e"])


def test_the_mesh_of_the_command_line():
    assert scaling.mesh_sizes("") == {}
    assert scaling.mesh_sizes("context") == {"context": -1}
    assert scaling.mesh_sizes("fsdp=8,data=-1") == {"fsdp": 8, "data": -1}
    with pytest.raises(ValueError, match="no axis 'fdsp'"):
        scaling.mesh_sizes("fdsp")


def test_the_table_and_the_plot_are_files(tmp_path):
    rows = [scaling.numbers(found(), CHIP, 0.5), scaling.numbers(found(devices=8, communication=[]), CHIP, 0.5)]
    scaling.write_csv(rows, tmp_path / "scaling.csv")
    lines = (tmp_path / "scaling.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].split(",")[-1] == "sent_fsdp_gb" and lines[2].endswith(",0")
    scaling.plot(rows, CHIP, "toy").savefig(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
