package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

// Result is one row of bench.json.
type Result struct {
	Bench  string  `json:"bench"`
	Target string  `json:"target"`
	Unit   string  `json:"unit"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Runs   int     `json:"runs"`
}

// row is what the values of one Result have in common.
type row struct{ bench, target, unit string }

// samples are measured values.
type samples map[row][]float64

func (s samples) add(bench, target, unit string, value float64) {
	r := row{bench, target, unit}
	s[r] = append(s[r], value)
}

func (s samples) summarise() []Result {
	var results []Result
	for r, values := range s {
		slices.Sort(values)
		results = append(results, Result{
			Bench: r.bench, Target: r.target, Unit: r.unit,
			Median: values[len(values)/2], Min: values[0], Max: values[len(values)-1], Runs: len(values),
		})
	}
	order(results)
	return results
}

// printResults prints a table for people.
func printResults(results []Result) {
	fmt.Println("| measured | of | median | min | max | unit |\n|---|---|---|---|---|---|")
	for _, r := range results {
		fmt.Printf("| %s | %s | %.3g | %.3g | %.3g | %s |\n", r.Bench, r.Target, r.Median, r.Min, r.Max, r.Unit)
	}
}

func order(results []Result) {
	slices.SortFunc(results, func(a, b Result) int {
		return cmp.Or(cmp.Compare(a.Bench, b.Bench), cmp.Compare(a.Target, b.Target))
	})
}

// merge writes the rows of several files into one. The same row in two of them is an error: one run has one answer.
func merge(output string, inputs ...string) error {
	var all []Result
	seen := map[row]string{}
	for _, input := range inputs {
		text, err := os.ReadFile(input)
		if err != nil {
			return err
		}
		var results []Result
		if err := json.Unmarshal(text, &results); err != nil {
			return fmt.Errorf("%s: %w", input, err)
		}
		for _, r := range results {
			key := row{r.Bench, r.Target, r.Unit}
			if other, ok := seen[key]; ok {
				return fmt.Errorf("%s of %s is in %s and in %s", r.Bench, r.Target, other, input)
			}
			seen[key] = input
		}
		all = append(all, results...)
	}
	order(all)
	return write(output, all)
}

func write(output string, results []Result) error {
	text, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(output, append(text, '\n'), 0o644)
}
