"""Text to batches: conversion, MDS shards, streaming, masking, packing."""
