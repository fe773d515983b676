//go:build decree_next_format

package command

// A binary that is built with this tag stands in for the next version in tests of
// upgrades: it knows one format more, and needs that for what has format 2 in truth.
// Nothing that it writes may be kept.
const (
	newest     = 4
	sinceParts = 4
)
