"""Likelihoods of data, and smoothers that iterate."""
