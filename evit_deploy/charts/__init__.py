"""Charts as SVG, drawn by Vega-Lite."""
