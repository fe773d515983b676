package backup_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"decree.dev/decree/raftstore/backup"
)

// days are snapshots at noon, so many days before now.
func days(ages ...int) []backup.Entry {
	var list []backup.Entry
	for _, age := range ages {
		list = append(list, backup.Entry{Name: at("a", -24*age-4, 1), Size: 1})
	}
	return list
}

func TestRetain(t *testing.T) {
	hourly := func(n int) (list []backup.Entry) {
		for i := range n {
			list = append(list, backup.Entry{Name: at("a", -i, uint64(n-i)), Size: 1})
		}
		return list
	}
	empty := func(list []backup.Entry, which ...int) []backup.Entry {
		for _, i := range which {
			list[i].Size = 0
		}
		return list
	}
	for name, c := range map[string]struct {
		list   []backup.Entry
		policy backup.Policy
		remove []backup.Entry
	}{
		"no policy":               {days(0, 1, 2), backup.Policy{}, nil},
		"none":                    {nil, backup.Policy{Keep: 1}, nil},
		"fewer than kept":         {days(0, 1), backup.Policy{Keep: 3}, nil},
		"the newest":              {days(0, 1, 2, 3), backup.Policy{Keep: 2}, days(2, 3)},
		"any order":               {days(3, 0, 2, 1), backup.Policy{Keep: 2}, days(2, 3)},
		"one a day":               {hourly(48), backup.Policy{Keep: 1, Daily: 3}, slices.Concat(hourly(48)[1:17], hourly(48)[18:41], hourly(48)[42:])},
		"one a week":              {days(0, 1, 2, 3, 4, 5, 6, 7, 8), backup.Policy{Keep: 1, Weekly: 2}, days(1, 2, 3, 5, 6, 7, 8)},
		"a month":                 {days(0, 20, 30, 31, 60), backup.Policy{Keep: 1, Monthly: 2}, days(20, 31, 60)},
		"days without are passed": {days(0, 10, 300, 900), backup.Policy{Keep: 1, Daily: 3}, days(900)},
		"from the future":         {days(-2, -1, 0, 1), backup.Policy{Keep: 1}, days(1)},
		"all from the future":     {days(-2, -1), backup.Policy{Keep: 1}, nil},
		"the newest is empty":     {empty(days(0, 1, 2), 0), backup.Policy{Keep: 1}, days(2)},
		"an old one is empty":     {empty(days(0, 1, 2), 1), backup.Policy{Keep: 5}, empty(days(1), 0)},
		"all are empty":           {empty(days(0, 1), 0, 1), backup.Policy{Keep: 1}, nil},
		"keep is one at least":    {days(0, 1), backup.Policy{Daily: 1}, days(1)},
	} {
		t.Run(name, func(t *testing.T) {
			if got := backup.Retain(c.list, c.policy, now); !cmp.Equal(got, names(c.remove)) {
				t.Errorf("removes %v, want %v", got, names(c.remove))
			}
		})
	}
}

func TestRetainProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []backup.Entry
		for i, hours := range rapid.SliceOfNDistinct(rapid.IntRange(-20_000, 100), 0, 60, rapid.ID[int]).Draw(t, "hours") {
			list = append(list, backup.Entry{Name: at("a", hours, uint64(i)), Size: rapid.Int64Range(0, 3).Draw(t, "size")})
		}
		p := backup.Policy{
			Keep: rapid.IntRange(0, 5).Draw(t, "keep"), Daily: rapid.IntRange(0, 5).Draw(t, "daily"),
			Weekly: rapid.IntRange(0, 5).Draw(t, "weekly"), Monthly: rapid.IntRange(0, 5).Draw(t, "monthly"),
		}
		before := slices.Clone(list)
		remove := backup.Retain(list, p, now)
		if !cmp.Equal(list, before) {
			t.Fatal("the list was changed")
		}
		left := slices.DeleteFunc(slices.Clone(list), func(e backup.Entry) bool { return slices.Contains(remove, e.Name) })
		if len(left)+len(remove) != len(list) {
			t.Fatalf("%v removes what is not there, or one twice", remove)
		}
		good := func(list []backup.Entry) (n int, newest time.Time) {
			for _, e := range list {
				if e.Size > 0 && !e.Name.Time.After(now) {
					n++
					if e.Name.Time.After(newest) {
						newest = e.Name.Time
					}
				}
			}
			return n, newest
		}
		had, newest := good(list)
		has, still := good(left)
		if !newest.Equal(still) {
			t.Fatalf("the newest good one went: %s, now %s", newest, still)
		}
		if p != (backup.Policy{}) && (has < min(had, max(p.Keep, 1)) || has > max(p.Keep, 1)+p.Daily+p.Weekly+p.Monthly) {
			t.Fatalf("%d of %d are left with %+v", has, had, p)
		}
		// Carrying it out makes it done.
		if again := backup.Retain(left, p, now); len(again) > 0 {
			t.Fatalf("a second run removes %v", again)
		}
	})
}
