"""Tests of the GPU job server, and the private fleet of SSH nodes they run against (`tests.fleet`)."""
