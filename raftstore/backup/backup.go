// Package backup takes the cluster's state and its Git repositories out of it into
// one archive, checks archives, keeps them in a folder or a bucket, and founds a new
// cluster from one.
//
// It does not know how repositories are stored or how a server is run: those come in
// as functions. It touches the archive, the target and the folder that it is told to
// make. DESIGN.md beside this file tells the format and what protects what.
package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"

	"decree.dev/decree/raftstore/state"
)

// Format is the version of the archive that this package writes. It reads no other.
const Format = 1

// ErrCorrupt is matched by the errors about archives that are not as they were
// written: cut off, changed, or made by something else.
var ErrCorrupt = errors.New("corrupt snapshot archive")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

// Manifest is the first thing in an archive: what it is a snapshot of.
type Manifest struct {
	Format    int       `json:"format"`
	ClusterID string    `json:"clusterID"`
	Revision  uint64    `json:"revision"`
	Index     uint64    `json:"index"` // log index of the last change
	Created   time.Time `json:"created"`
	Version   string    `json:"version,omitempty"` // of decree
	// Parts are what the archive holds, in order: "state", then "git/NAME" of every
	// repository.
	Parts []string `json:"parts"`
}

// Repositories returns the names of the Git repositories in the archive.
func (m *Manifest) Repositories() []string {
	var names []string
	for _, part := range m.Parts {
		if name, ok := repositoryOf(part); ok {
			names = append(names, name)
		}
	}
	return names
}

// Sum is what one part has to be.
type Sum struct {
	Part   string `json:"part"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // hexadecimal digits
}

// Repositories are the built-in Git repositories of a server, as the state of a
// [Source] names them.
type Repositories interface {
	// Names of all repositories that the state knows.
	Names() ([]string, error)
	// Export writes everything in one repository, at one moment, to w. The bytes are
	// opaque here.
	Export(ctx context.Context, name string, w io.Writer) error
}

// Source is what [Save] saves. State must have been read before the repositories are,
// so that they hold every commit that it names.
type Source struct {
	State *state.State
	// Repositories may be nil: the archive then has none.
	Repositories Repositories
	Version      string    // of decree
	Now          time.Time // when State was read
}

const (
	partState    = "state"
	gitPrefix    = "git/"
	fileManifest = "manifest.json"
	fileSums     = "sums.json"
)

var repositoryName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// repositoryOf returns the repository whose part it is.
func repositoryOf(part string) (name string, ok bool) {
	if len(part) <= len(gitPrefix) || part[:len(gitPrefix)] != gitPrefix {
		return "", false
	}
	name = part[len(gitPrefix):]
	return name, repositoryName.MatchString(name)
}
