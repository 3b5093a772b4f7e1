"""How figures and tables are written, the same in a terminal, in Markdown and in HTML."""
