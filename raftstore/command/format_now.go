//go:build !decree_next_format

package command

const (
	newest     = 3
	sinceParts = 2
)
