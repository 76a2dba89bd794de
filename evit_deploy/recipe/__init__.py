"""What a run is asked to do: sections, files and overrides."""
