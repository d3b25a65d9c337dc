package main

import (
	"os/exec"
	"testing"
	"time"
)

func TestAProcessThatStandsStillIsEnded(t *testing.T) {
	t.Parallel()
	still := exec.Command("sleep", "1000")
	if err := still.Start(); err != nil {
		t.Fatal(err)
	}
	endFrozen(t.Context(), still.Process, 100*time.Millisecond)
	if err := still.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("it ended with %v", err)
	}
}

func TestAProcessThatWorksIsLeftAlone(t *testing.T) {
	t.Parallel()
	busy := exec.Command("sh", "-c", "while :; do :; done")
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		endFrozen(t.Context(), busy.Process, 5*time.Second)
		close(ended)
	}()
	for first := ""; ; time.Sleep(10 * time.Millisecond) {
		now, err := processorTime(busy.Process.Pid)
		if err != nil {
			t.Fatalf("it was ended: %v", err)
		}
		if first == "" {
			first = now
		}
		if now != first {
			break
		}
	}
	select {
	case <-ended:
		t.Error("a process that works was given up")
	default:
	}
	busy.Process.Kill()
	busy.Wait()
	<-ended
}
