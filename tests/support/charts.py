"""Charts as Vega-Lite takes them."""

import vl_convert

from cap_hf.pages.chart import VERSION, Chart


def compiled(chart: Chart) -> dict:
    """The Vega specification of a chart: an error where Vega-Lite cannot read it."""
    return vl_convert.vegalite_to_vega(chart.whole(), vl_version=VERSION)


def drawn(chart: Chart) -> str:
    """The chart as SVG."""
    return vl_convert.vegalite_to_svg(chart.whole() | {"width": 500}, vl_version=VERSION)
