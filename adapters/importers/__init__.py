"""Other people's adapter checkpoints -> adapter packages. One module per source, each around a table of names."""
