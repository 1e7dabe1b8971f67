"""Criteria of other libraries, restated in plain torch from their formulas: the names and attributes are theirs."""
