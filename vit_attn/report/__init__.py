"""The comparison report: finished runs read from disk, grouped by mechanism, compared fairly, written as a page."""
