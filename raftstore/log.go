package raftstore

// log is a queue that can be read at any place: a ring that grows as needed.
type log[T any] struct {
	ring  []T
	first int
	n     int
}

func (l *log[T]) len() int { return l.n }

// at returns the i-th oldest element.
func (l *log[T]) at(i int) T { return l.ring[(l.first+i)&(len(l.ring)-1)] }

func (l *log[T]) push(v T) {
	if l.n == len(l.ring) {
		grown := make([]T, max(16, 2*l.n)) // a power of two
		for i := range l.n {
			grown[i] = l.at(i)
		}
		l.ring, l.first = grown, 0
	}
	l.ring[(l.first+l.n)&(len(l.ring)-1)] = v
	l.n++
}

// pop removes and returns the oldest element; there must be one.
func (l *log[T]) pop() T {
	var zero T
	v := l.ring[l.first]
	l.ring[l.first] = zero
	l.first = (l.first + 1) & (len(l.ring) - 1)
	l.n--
	return v
}
