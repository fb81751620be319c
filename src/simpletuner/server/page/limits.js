// The API's limits for a request to generate images, as JSON; tests/contracts/test_page.py compares them with the API.

export const LIMITS = {
  "seed": { "min": 0, "max": 4294967295 },
  "count": { "min": 1, "max": 16 },
  "width": { "min": 16, "max": 2048, "step": 16 },
  "height": { "min": 16, "max": 2048, "step": 16 },
  "steps": { "min": 1, "max": 500 },
  "guidance": { "min": 0, "max": 100 },
  "strengths": { "min": -10, "max": 10, "items": 12 },
  "references": { "items": 10 }
};
