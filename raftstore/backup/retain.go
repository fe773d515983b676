package backup

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// Policy says which snapshots of a cluster are kept: the newest Keep, and beside them
// the newest one of each of the newest Daily days, Weekly weeks (ISO 8601) and Monthly
// months that have any, in UTC. With all of them zero, everything is kept.
type Policy struct {
	Keep, Daily, Weekly, Monthly int
}

// Check says what is wrong with p.
func (p Policy) Check() error {
	if min(p.Keep, p.Daily, p.Weekly, p.Monthly) < 0 {
		return fmt.Errorf("retention %+v: numbers below zero", p)
	}
	if p != (Policy{}) && p.Keep == 0 {
		return errors.New("retention: keep one snapshot at least beside the daily, weekly and monthly ones")
	}
	return nil
}

// Retain plans what to delete from the snapshots of one cluster. It is pure.
//
// What counts are the periods that have snapshots, not the time that has passed: a cluster
// that stood still for a year keeps what it had. Snapshots from after now come from
// a clock that was wrong, maybe this one: they are kept and take nobody's place. Empty
// files are no snapshots; they are deleted once there is a newer one that is. The newest
// one that is not empty is never deleted.
func Retain(list []Entry, p Policy, now time.Time) []Name {
	if p == (Policy{}) {
		return nil
	}
	p.Keep = max(p.Keep, 1)
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, func(a, b Entry) int { return older(b.Name, a.Name) }) // newest first
	rules := []*rule{
		{places: p.Keep, period: func(e Name) string { return e.String() }},
		{places: p.Daily, period: func(e Name) string { return e.Time.UTC().Format(time.DateOnly) }},
		{places: p.Weekly, period: func(e Name) string {
			year, week := e.Time.UTC().ISOWeek()
			return fmt.Sprint(year, " ", week)
		}},
		{places: p.Monthly, period: func(e Name) string { return e.Time.UTC().Format("2006-01") }},
	}
	var remove []Name
	good := false
	for _, e := range sorted {
		switch {
		case e.Name.Time.After(now):
		case e.Size <= 0:
			if good {
				remove = append(remove, e.Name)
			}
		default:
			good = true
			if !kept(rules, e.Name) {
				remove = append(remove, e.Name)
			}
		}
	}
	return remove
}

// rule keeps the first snapshot that it sees of each period, until its places are taken.
type rule struct {
	places int
	period func(Name) string
	last   string
}

// kept lets every rule take the snapshot, whether or not another one keeps it.
func kept(rules []*rule, n Name) bool {
	keep := false
	for _, r := range rules {
		if period := r.period(n); r.places > 0 && period != r.last {
			r.last = period
			r.places--
			keep = true
		}
	}
	return keep
}
