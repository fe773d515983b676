package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// Info is what an archive says of itself.
type Info struct {
	Lock
	// Manifest is nil where the key was not given.
	Manifest *Manifest `json:"manifest,omitempty"`
}

// Inspect reads the beginning of an archive. Without a key it says how an encrypted
// one is locked, and that is no error. Nothing behind the manifest is checked: see
// [Verify].
func Inspect(r io.Reader, keys Keys) (Info, error) {
	plain, lock, err := unlock(r, keys)
	info := Info{Lock: lock}
	if errors.Is(err, ErrEncrypted) {
		return info, nil
	}
	if err != nil {
		return info, fmt.Errorf("inspect snapshot: %w", err)
	}
	a, err := openArchive(context.Background(), plain)
	if err != nil {
		return info, fmt.Errorf("inspect snapshot: %w", err)
	}
	defer a.close()
	info.Manifest = &a.manifest
	return info, nil
}

// Report is what [Verify] found.
type Report struct {
	Info
	Sums []Sum `json:"sums"`
	// Objects is how many objects the state holds.
	Objects int `json:"objects"`
	// Unchecked are the parts whose bytes are those that were written, and of which
	// nothing else is known.
	Unchecked []string `json:"unchecked,omitempty"`
}

// CheckRepository reads an exported repository to its end and says what is wrong with
// it, for example that it lacks what the state s names.
type CheckRepository func(ctx context.Context, s *state.State, name string, r io.Reader) error

// Verify reads all of an archive: it decodes the state, gives every repository to
// check (nil: their bytes are compared only), and compares the sums. Memory is needed
// for the state. Errors that match [ErrCorrupt] say that the archive is of no use.
func Verify(ctx context.Context, r io.Reader, keys Keys, check CheckRepository) (Report, error) {
	plain, lock, err := unlock(r, keys)
	if err != nil {
		return Report{Info: Info{Lock: lock}}, fmt.Errorf("verify snapshot: %w", err)
	}
	report, err := verify(ctx, plain, check)
	report.Lock = lock
	if err != nil {
		return report, fmt.Errorf("verify snapshot: %w", err)
	}
	return report, nil
}

func verify(ctx context.Context, plain io.Reader, check CheckRepository) (Report, error) {
	var report Report
	var of *state.State
	err := walk(ctx, plain, visitor{
		manifest: func(m *Manifest) error { report.Manifest = m; return nil },
		state:    func(s *state.State) error { of, report.Objects = s, countObjects(s); return nil },
		repository: func(name string, r io.Reader) error {
			if check == nil {
				report.Unchecked = append(report.Unchecked, gitPrefix+name)
				return nil
			}
			if err := check(ctx, of, name, r); err != nil {
				return corrupt("repository %s: %w", name, err)
			}
			return nil
		},
		end: func(sums []Sum) { report.Sums = sums },
	})
	return report, err
}

// visitor takes what an archive holds. What it is given is not known to be complete
// until walk returns nil.
type visitor struct {
	manifest   func(*Manifest) error
	state      func(*state.State) error
	repository func(name string, r io.Reader) error
	end        func([]Sum)
}

// walk reads all of a plain archive.
func walk(ctx context.Context, plain io.Reader, v visitor) error {
	a, err := openArchive(ctx, plain)
	if err != nil {
		return err
	}
	defer a.close()
	if err := v.manifest(&a.manifest); err != nil {
		return err
	}
	for part, ok := a.nextPart(); ok; part, ok = a.nextPart() {
		if name, isRepository := repositoryOf(part.name); isRepository {
			err = v.repository(name, part)
		} else {
			err = a.state(part, v)
		}
		if part.err != nil { // the cause, whatever was made of it
			err = part.err
		}
		if err == nil {
			err = part.finish()
		}
		if err != nil {
			return err
		}
	}
	if err := a.finish(); err != nil {
		return err
	}
	if v.end != nil {
		v.end(a.sums)
	}
	return nil
}

// state decodes the state and compares it with the manifest.
func (a *archiveReader) state(part *partReader, v visitor) error {
	s, err := state.Read(part)
	if err != nil {
		if errors.Is(err, state.ErrCorrupt) {
			return corrupt("%w", err)
		}
		return err
	}
	m := &a.manifest
	if s.Settings() == nil || s.Settings().ClusterID != m.ClusterID || s.Revision() != m.Revision || s.Index() != m.Index {
		return corrupt("its state is not the one that its manifest describes")
	}
	return v.state(s)
}

// Reseal copies the plain archive src to dst as p asks for, and checks it on the way as
// [Verify] does. After an error, dst is recognisable as incomplete.
func Reseal(ctx context.Context, dst io.Writer, src io.Reader, p Protection) (Report, error) {
	locked, err := p.wrap(dst)
	if err != nil {
		return Report{}, err
	}
	var report Report
	var checkErr error
	pr, pw := io.Pipe()
	var checking sync.WaitGroup
	checking.Go(func() {
		report, checkErr = verify(ctx, pr, nil)
		pr.CloseWithError(checkErr)
	})
	_, err = io.Copy(io.MultiWriter(locked, pw), src)
	pw.CloseWithError(err) // io.EOF where err is nil
	checking.Wait()
	switch {
	case err != nil && !errors.Is(err, checkErr):
		return report, fmt.Errorf("copy snapshot: %w", err)
	case checkErr != nil:
		return report, fmt.Errorf("copy snapshot: %w", checkErr)
	}
	if err := locked.Close(); err != nil {
		return report, fmt.Errorf("copy snapshot: %w", err)
	}
	report.Encrypted = !p.Plaintext
	return report, nil
}

func countObjects(s *state.State) int {
	n := 0
	for _, k := range api.Kinds() {
		n += s.Len(k.Resource)
	}
	return n
}
