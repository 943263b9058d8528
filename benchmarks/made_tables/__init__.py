"""One function per table of the documents, from a record to Markdown."""
