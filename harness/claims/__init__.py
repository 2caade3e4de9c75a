"""The book of claims: what the literature says of these algorithms, examined by enumeration and Monte Carlo.

`claim` says what a claim is and how its verdict follows from its checks; `book` knows them all; each of the other
modules holds the claims of one subject, one function per claim.
"""
