"""One self-contained HTML page about a finished run, and the same facts as JSON."""
