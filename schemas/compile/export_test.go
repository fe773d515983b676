package compile

// AwaitWarm waits until a worker has been started ahead and has loaded its definitions.
func (p *Process) AwaitWarm() {
	p.warm.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ready != nil {
		_, _ = p.ready.out.r.Peek(9)
	}
}

// Started is how many workers were started.
func (p *Process) Started() int64 { return p.spawn.started.Load() }
