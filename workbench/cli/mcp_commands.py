"""Placeholder while the MCP commands are written."""
