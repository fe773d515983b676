package state

import (
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestTree compares a tree with a map, over many edits, and makes sure that no edit
// changes a version from before it.
func TestTree(t *testing.T) {
	type version struct {
		tree tree[int, int]
		want map[int]int
	}
	rapid.Check(t, func(t *rapid.T) {
		versions := []version{{want: map[int]int{}}}
		for range rapid.IntRange(1, 20).Draw(t, "edits") {
			from := versions[rapid.IntRange(0, len(versions)-1).Draw(t, "from")] // also two from the same
			next := version{tree: from.tree, want: maps.Clone(from.want)}
			e := new(edit)
			for range rapid.IntRange(0, 20).Draw(t, "changes") {
				// Runs of keys in a row, so that nodes fill up and become empty.
				first, step := rapid.IntRange(0, 3000).Draw(t, "key"), rapid.SampledFrom([]int{1, -1, 7}).Draw(t, "step")
				remove := rapid.Bool().Draw(t, "remove")
				for i := range rapid.IntRange(1, 400).Draw(t, "run") {
					k := max(0, min(first+i*step, 3000))
					if remove {
						next.tree.delete(e, k)
						delete(next.want, k)
					} else {
						next.tree.set(e, k, i)
						next.want[k] = i
					}
				}
			}
			versions = append(versions, next)
		}
		for _, v := range versions {
			checkTree(t, v.tree, v.want)
		}
	})
}

func checkTree(t *rapid.T, tr tree[int, int], want map[int]int) {
	if tr.Len() != len(want) {
		t.Fatalf("%d entries, want %d", tr.Len(), len(want))
	}
	if got := maps.Collect(tr.all()); !maps.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	keys := slices.Sorted(maps.Keys(want))
	var got []int
	for k := range tr.all() {
		got = append(got, k)
	}
	if !slices.Equal(got, keys) {
		t.Fatalf("in order %v, want %v", got, keys)
	}
	for k := range 3002 {
		v, ok := tr.get(k)
		if w, exists := want[k]; ok != exists || v != w {
			t.Fatalf("get %d: %d, %v, want %d, %v", k, v, ok, w, exists)
		}
		i, _ := slices.BinarySearch(keys, k)
		n := 0
		for first := range tr.from(k) {
			if first != keys[i] {
				t.Fatalf("from %d comes %d, not %d", k, first, keys[i])
			}
			n++
			break
		}
		if n == 0 && i < len(keys) {
			t.Fatalf("from %d comes nothing, there is %d", k, keys[i])
		}
	}
	if tr.root != nil {
		checkBranch(t, tr.root, true)
	}
}

// checkBranch: nodes are never empty nor too large, and bounds hold.
func checkBranch(t *rapid.T, n *branch[int, int], root bool) {
	if len(n.keys) == 0 || len(n.keys) > full || !slices.IsSorted(n.keys) || root && n.kids != nil && len(n.kids) == 1 {
		t.Fatalf("a node with the keys %v and %d kids", n.keys, len(n.kids))
	}
	if n.kids == nil && len(n.values) != len(n.keys) || n.kids != nil && len(n.kids) != len(n.keys) {
		t.Fatalf("a node with the keys %v, %d values and %d kids", n.keys, len(n.values), len(n.kids))
	}
	for i, kid := range n.kids {
		if kid.keys[0] < n.keys[i] || i > 0 && n.kids[i-1].keys[len(n.kids[i-1].keys)-1] >= n.keys[i] {
			t.Fatalf("kid %d with the keys %v is not at %d", i, kid.keys, n.keys[i])
		}
		checkBranch(t, kid, false)
	}
}
