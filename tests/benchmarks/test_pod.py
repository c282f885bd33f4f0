"""Figures from a compiled program, on lines as the compiler writes them."""

import json

from benchmarks import pod

PROGRAM = """
  %all-reduce.92 = (bf16[3,3,512]{2,1,0:T(8,128)S(1)}, f32[]{:T(128)}, /*index=2*/f32[96]{0}) all-reduce(%a, %b, %c)
  %all-gather.1 = bf16[256,3,6,512]{3,2,1,0} all-gather(%x), dimensions={0}
  %all-gather-start.2 = (u32[2]{0}, u32[8]{0}) all-gather-start(%y), dimensions={0}
  %all-gather-done.2 = u32[8]{0} all-gather-done(%all-gather-start.2)
  %fusion.3 = f32[1024]{0} fusion(%all-reduce.92), calls=%add
  %get-tuple-element.4 = f32[96]{0} get-tuple-element(%all-reduce.92), index=2
"""


def test_each_collective_is_counted_once_with_the_bytes_of_its_result():
    found = pod.collectives_of(PROGRAM)
    assert found == {
        "all-reduce": {"count": 1, "bytes": 2 * 3 * 3 * 512 + 4 + 4 * 96},
        "all-gather": {"count": 2, "bytes": 2 * 256 * 3 * 6 * 512 + 4 * 8},
    }


PIECEWISE = """
  %all-gather.34 = bf16[5,5,96,256]{2,3} all-gather(%param_0), channel_id=1, frontend_attributes={chain_id="0"}
  %all-gather.44 = bf16[3,3,512,512]{3,2} all-gather(%param_0), channel_id=1, frontend_attributes={chain_id="1"}
  %all-gather.36 = bf16[5,5,96,256]{2,3} all-gather(%param_0), channel_id=1, frontend_attributes={chain_id="0"}
"""


def test_a_collective_in_pieces_is_counted_once():
    found = pod.collectives_of(PIECEWISE)
    assert found == {"all-gather": {"count": 2, "bytes": 2 * (5 * 5 * 96 * 256 + 3 * 3 * 512 * 512)}}


def test_a_program_for_one_chip_has_no_collectives():
    assert pod.collectives_of("%fusion.3 = f32[1024]{0} fusion(%a), calls=%add") == {}


MULTISLICE = """
  %send.1 = (bf16[144,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%b, %a), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[144,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%a), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done.1 = token[] send-done(%send.1), channel_id=7, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
"""  # noqa: E501


def test_what_goes_to_other_slices_is_counted_apart():
    assert pod.bytes_between_slices(MULTISLICE) == 2 * 144 * 8 * 128
    assert pod.bytes_between_slices(PROGRAM) == 0
    assert pod.collectives_of(MULTISLICE) == {}


def test_no_program_is_compiled_twice():
    arguments = pod.Arguments(
        topology=("v5e:1x1", "v5e:2x2"), step=("train", "hotspots"), layout=("split", "data"), json=None
    )
    assert pod.programs(arguments) == [
        ("train", "v5e:1x1", "data"),
        ("train", "v5e:2x2", "split"),
        ("train", "v5e:2x2", "data"),
        ("hotspots", "v5e:1x1", "data"),
        ("hotspots", "v5e:2x2", "data"),
    ]


def test_figures_of_an_earlier_call_are_kept(tmp_path, monkeypatch):
    def compiled(step, topology, kind, arguments):
        which = {"step": step, "chips": int(topology[-1]), "layout": kind, "batch_size": 256, "dtype": "bfloat16"}
        return which | {"flops": next(numbers), "does_not_fit": ""}

    numbers = iter(range(9))
    monkeypatch.setattr(pod, "figures_of", compiled)
    path = tmp_path / "figures.json"
    for topology, kind in (("v5e:2", "split"), ("v5e:1", "data"), ("v5e:2", "split")):
        pod.main(pod.Arguments(topology=(topology,), layout=(kind,), json=path))
    assert [(each["chips"], each["flops"]) for each in json.loads(path.read_text())] == [(1, 1), (2, 2)]
