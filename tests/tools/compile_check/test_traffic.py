"""What is read off a program's HLO of how often it goes over large arrays."""

from __future__ import annotations

from quire.tools.compile_check.traffic import Traffic, read_traffic

BIG, HALF = "f32[8,100]{1,0}", "s16[8,100]{1,0}"
HLO = f"""HloModule jit_it, is_scheduled=true

%fused_sum (p: {BIG}, q: {HALF}) -> f32[8] {{
  %p = {BIG} parameter(0)
  %q = {HALF} parameter(1)
  ROOT %s = f32[8]{{0}} reduce(%p, %q), dimensions={{1}}, to_apply=%add
}}

%fused_pick (p.1: {BIG}, i: s32[8]) -> f32[8] {{
  %p.1 = {BIG} parameter(0)
  %b = f32[800]{{0}} bitcast(%p.1)
  %i = s32[8]{{0}} parameter(1)
  ROOT %g = f32[8]{{0}} gather(%b, %i), slice_sizes={{1}}
}}

%fused_put (p.2: {BIG}, i.2: s32[8]) -> {BIG} {{
  %p.2 = {BIG} parameter(0)
  %i.2 = s32[8]{{0}} parameter(1)
  ROOT %w = {BIG} scatter(%p.2, %i.2, %i.2), to_apply=%last
}}

%fused_two (p.3: {BIG}) -> (f32[8], {BIG}) {{
  %p.3 = {BIG} parameter(0)
  %e = {BIG} exponential(%p.3)
  %m = f32[8]{{0}} reduce(%e), dimensions={{1}}, to_apply=%add
  ROOT %t = (f32[8]{{0}}, {BIG}) tuple(%m, %e)
}}

%body (s.1: ({BIG}, s32[])) -> ({BIG}, s32[]) {{
  %s.1 = ({BIG}, /*index=1*/s32[]) parameter(0)
  %x.1 = {BIG} get-tuple-element(%s.1), index=0
  %c.1 = {BIG} copy(%x.1)
  ROOT %t.1 = ({BIG}, s32[]) tuple(%c.1, %x.1)
}}

ENTRY %main (a: {BIG}, h: {HALF}) -> f32[8] {{
  %a = {BIG} parameter(0)
  %h = {HALF} parameter(1)
  LINES
}}
"""
KERNELS = {
    "sum": ("%r = f32[8]{0} fusion(%a, %h), kind=kInput, calls=%fused_sum", Traffic(4800, 0)),
    "pick": ("%r = f32[8]{0} fusion(%a, %h), kind=kLoop, calls=%fused_pick", Traffic()),
    "put": (f"%r = {BIG} fusion(%a, %h), kind=kInput, calls=%fused_put", Traffic()),
    "two": (f"%r = (f32[8], {BIG}) fusion(%a), kind=kInput, calls=%fused_two", Traffic(3200, 3200)),
    "two, started": (
        f"%r = (({BIG}), (f32[8], {BIG}), u32[]) fusion-start(%a), kind=kInput, calls=%fused_two",
        Traffic(3200, 3200),
    ),
    "of a library": ('%r = f32[8]{0} custom-call(%a), custom_call_target="x"', Traffic(3200, 0)),
    "known rounds": (
        f"%r = ({BIG}, s32[]) while(%a), condition=%c, body=%body, "
        'backend_config={"known_trip_count":{"n":"3"}}',
        Traffic(9600, 9600),
    ),
    "rounds as it comes": (
        f"%r = ({BIG}, s32[]) while(%a), condition=%c, body=%body",
        Traffic(0, 0, 3200, 3200),
    ),
}


def test_each_kind_of_kernel() -> None:
    for name, (line, want) in KERNELS.items():
        assert read_traffic(HLO.replace("LINES", line), 800) == want, name
        assert read_traffic(HLO.replace("LINES", line), 801) == Traffic(), name


def test_kernels_add_up() -> None:
    lines = "\n  ".join(KERNELS[name][0] for name in ("sum", "two", "rounds as it comes"))
    assert read_traffic(HLO.replace("LINES", lines), 800) == Traffic(8000, 3200, 3200, 3200)
