package plan

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"decree.dev/decree/schemas/api"
)

// trailer is the line at the end of a commit message that replaces the deletion
// budget for that commit: "Decree-Allow-Deletions: 12" or "…: all".
const trailer = "Decree-Allow-Deletions"

// AllowDeletions reads [Input.AllowDeletions] from the last paragraph of a commit
// message: -1 for "all", 0 when the message says nothing. The error tells the
// author what is wrong with the line.
func AllowDeletions(message string) (int, error) {
	message = strings.TrimSpace(strings.ReplaceAll(message, "\r\n", "\n"))
	if i := strings.LastIndex(message, "\n\n"); i >= 0 {
		message = message[i+2:]
	}
	allowed := 0
	for line := range strings.Lines(message) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || !strings.EqualFold(name, trailer) {
			continue
		}
		value = strings.TrimSpace(value)
		if value == "all" {
			allowed = -1
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 {
			return 0, fmt.Errorf("commit message: %s: expected a number above zero or \"all\"; found %q", trailer, value)
		}
		allowed = n
	}
	return allowed, nil
}

// Text writes the change set for people: one object per line, the changed fields
// with their places in Git, and a summary as the last line. A refused one is its
// refusals, one per line.
func (c ChangeSet) Text(w io.Writer) error {
	var b strings.Builder
	if len(c.Refusals) > 0 {
		for _, d := range c.Refusals {
			fmt.Fprintln(&b, d.Error())
		}
		_, err := io.WriteString(w, b.String())
		return err
	}
	width := 0
	for _, ch := range c.Changes {
		width = max(width, utf8.RuneCountInString(ch.Key.String()))
	}
	var created, updated, deleted int
	for i, ch := range c.Changes {
		name := fmt.Sprintf("%-*s", width, ch.Key)
		switch ch.Verb {
		case api.Create.String():
			created++
			fmt.Fprintf(&b, "+ %s  %s\n", name, ch.File)
		case api.Delete.String():
			deleted++
			fmt.Fprintf(&b, "- %s  %s\n", name, ch.File)
		default:
			updated++
			c.textUpdate(&b, name, i)
		}
	}
	fmt.Fprintf(&b, "%d to change, %d to add, %d to delete, %d unchanged\n", updated, created, deleted, c.Unchanged)
	_, err := io.WriteString(w, b.String())
	return err
}

func (c ChangeSet) textUpdate(b *strings.Builder, name string, i int) {
	var edits []Edit
	if i < len(c.Edits) {
		edits = c.Edits[i]
	}
	if len(edits) == 0 {
		fmt.Fprintf(b, "~ %s  %s\n", name, c.Changes[i].File)
		return
	}
	prefix := "~ " + name
	for _, e := range edits {
		fmt.Fprintf(b, "%s  %s  %s\n", prefix, e, api.Position{File: e.Pos.File, Line: e.Pos.Line})
		prefix = strings.Repeat(" ", utf8.RuneCountInString(prefix))
	}
	if len(edits) == MaxEdits {
		fmt.Fprintf(b, "%s  (only the first %d changed fields are shown)\n", prefix, MaxEdits)
	}
}

// String is `spec.replicas: 2 → 4`.
func (e Edit) String() string {
	switch {
	case e.Hidden:
		return e.Field + ": changed (secret)"
	case e.Old == "":
		return e.Field + ": added " + e.New
	case e.New == "":
		return e.Field + ": removed " + e.Old
	}
	return fmt.Sprintf("%s: %s → %s", e.Field, e.Old, e.New)
}
