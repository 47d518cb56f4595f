"""Tables for the terminal and in Markdown, figures, and the page of a report."""
